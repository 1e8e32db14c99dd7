"""CamStyle's passes and losses (formulas.md: camstyle)."""

import pytest
import torch

from ecn_dist import config as configuration
from ecn_dist.methods import describe
from ecn_dist.methods.base import Step
from ecn_dist.methods.camstyle.method import CamStyle
from ecn_dist.methods.camstyle.options import CamStyleOptions
from tests.networks import batch, setting

AT = Step(3, 0, source_only=False)


def new_camstyle(smoothing: float = 0.1) -> CamStyle:
    torch.manual_seed(0)
    return CamStyle(setting(own=CamStyleOptions(smoothing=smoothing), dtype=torch.float64)).double()


def images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(count, 3, 64, 32, generator=generator, dtype=torch.float64)
        for name, count in (("source", 6), ("copies", 3))
    }


def test_losses_are_those_of_the_formula() -> None:
    """Two means of equal weight; a copy's target is 0.8 for its identity, and 0.2 over all 7, itself among them."""
    camstyle, shown = new_camstyle(smoothing=0.2), images()
    camstyle.source_dropout.probability = camstyle.copies_dropout.probability = 0.0
    labels = {"source": torch.tensor([0, 1, 2, 3, 4, 5]), "copies": torch.tensor([6, 0, 3])}
    losses = camstyle.losses(camstyle(shown, AT), {name: batch(labels[name]) for name in labels}, AT)

    def log_p(name: str) -> torch.Tensor:
        z = camstyle.embedding(camstyle.backbone(shown[name]))
        return torch.log_softmax(camstyle.source_head(torch.relu(z)), dim=1)

    real = -torch.stack([log_p("source")[i, label] for i, label in enumerate(labels["source"])]).mean()
    of_copies = log_p("copies")
    copies = torch.stack(
        [-0.8 * of_copies[i, label] - 0.2 / 7 * of_copies[i].sum() for i, label in enumerate(labels["copies"])]
    ).mean()
    torch.testing.assert_close(losses["loss_source"], real, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses["loss_copies"], copies, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses["loss"], real + copies, rtol=1e-10, atol=0)


def test_the_two_passes_drop_other_entries() -> None:
    camstyle = new_camstyle()
    features = torch.ones(3, 16)
    assert not torch.equal(camstyle.source_dropout(features, 3), camstyle.copies_dropout(features, 3))


def test_copies_are_labelled_pictures_in_other_styles() -> None:
    source, copies = new_camstyle().feeds()
    assert (source.batch_size, source.style) == (12, "real")
    assert (copies.domain, copies.batch_size, copies.instances, copies.style) == ("source", 48, 0, "other")


def test_options_are_checked_and_told() -> None:
    places = ["--method", "camstyle", "--source", "s", "--output_dir", "o"]  # it needs no target
    for options, text in (
        (["--camstyle.copies", "46"], "camstyle.copies: a batch of 46 pictures must be a multiple of data.streams"),
        (["--camstyle.smoothing", "1"], "camstyle.smoothing: 1.0 must be at least 0 and below 1"),
        (["--memory.momentum", "0.5"], "memory.momentum: method camstyle has no use for it"),
    ):
        with pytest.raises(configuration.UserError, match=text):
            configuration.parse([*places, *options], "test", "").check()
    config = configuration.parse(places, "test", "")
    config.check()
    assert "smoothed by 0.1" in describe(configuration.flatten(config))
