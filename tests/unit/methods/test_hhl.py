"""HHL's passes and losses (formulas.md: hhl)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ecn_dist import config as configuration
from ecn_dist.methods import describe
from ecn_dist.methods.base import Step
from ecn_dist.methods.hhl.method import HHL
from ecn_dist.methods.hhl.options import HHLOptions
from tests import reference
from tests.networks import batch, setting

AT = Step(3, 0, source_only=False)
CAMERAS = 3


def new_hhl(**options: Any) -> HHL:
    torch.manual_seed(0)
    return HHL(setting(num_exemplars=9, own=HHLOptions(**options), dtype=torch.float64)).double()


def images() -> dict[str, torch.Tensor]:
    counts = {"source": 4, "identities": 6, "target": 2 * CAMERAS}
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(count, 3, 64, 32, generator=generator, dtype=torch.float64) for name, count in counts.items()
    }


def test_losses_are_those_of_the_formula() -> None:
    hhl, shown = new_hhl(margin=0.4, triplet_weight=0.7), images()
    hhl.source_dropout.probability = 0.0
    labels = {"source": torch.tensor([3, 1, 1, 0]), "identities": torch.tensor([2, 2, 2, 5, 5, 5])}
    indices = torch.tensor([4, 4, 4, 2, 2, 2])
    batches = {name: batch(labels[name]) for name in labels} | {"target": batch(None, indices)}
    outputs = hhl(shown, AT)
    losses = hhl.losses(outputs, batches, AT)

    relu = {name: torch.relu(hhl.embedding(hhl.backbone(pictures))) for name, pictures in shown.items()}
    source = F.cross_entropy(hhl.source_head(relu["source"]), labels["source"])
    embeddings = torch.cat([relu["identities"], relu["target"]]) @ hhl.triplet_head.weight.T
    # A target picture and its copies are one identity, which no source picture has: here 100 and 101.
    triplets = reference.triplet_loss(embeddings, torch.tensor([2, 2, 2, 5, 5, 5, 100, 100, 100, 101, 101, 101]), 0.4)
    torch.testing.assert_close(losses["loss_source"], source, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses["loss_triplet"], triplets, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses["loss"], source + 0.7 * triplets, rtol=1e-10, atol=0)


def test_every_layer_trains() -> None:
    """The published code leaves the linear layers and their BatchNorm out of the optimiser."""
    hhl = new_hhl()
    groups = hhl.parameter_groups(lr=0.1, backbone_lr=0.01)
    new = {id(parameter) for group in groups if group["name"] == "new" for parameter in group["params"]}
    for part in (hhl.embedding, hhl.source_head, hhl.triplet_head):
        assert {id(parameter) for parameter in part.parameters()} <= new


def test_feeds_ask_for_identities_and_for_all_copies() -> None:
    source, identities, target = new_hhl().feeds()
    assert (source.batch_size, source.instances) == (12, 0)
    assert (identities.domain, identities.batch_size, identities.instances) == ("source", 64, 8)
    assert (target.batch_size, target.style) == (16, "all")


def test_options_are_checked_and_told() -> None:
    places = ["--method", "hhl", "--source", "s", "--target", "t", "--output_dir", "o"]
    for options, text in (
        (["--hhl.target_pictures", "20"], r"hhl.target_pictures: a batch of 20 pictures must be a multiple of data.st"),
        (["--hhl.instances", "3"], r"hhl.source_identities x hhl.instances: a batch of 24 pictures"),
        (["--hhl.margin", "-1"], "hhl.margin: -1.0 must be at least 0"),
        (["--loss.target_weight", "0.5"], "loss.target_weight: method hhl has no use for it"),
    ):
        with pytest.raises(configuration.UserError, match=text):
            configuration.parse([*places, *options], "test", "").check()
    config = configuration.parse(places, "test", "")
    config.check()
    assert "copies in other cameras' styles" in describe(configuration.flatten(config))
    assert "control" in describe({"method": "hhl", "hhl.triplet_weight": 0})
