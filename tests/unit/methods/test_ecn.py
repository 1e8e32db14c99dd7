"""ECN's passes (formulas.md: Network), and what it tells of itself."""

import dataclasses

import torch

from ecn_dist.config import build_parser
from ecn_dist.methods import METHODS, describe
from ecn_dist.methods.base import Step
from ecn_dist.methods.ecn.method import ECN
from tests.networks import ecn_network

AT = Step(3, 0, source_only=False)


def new_network() -> ECN:
    torch.manual_seed(0)
    return ecn_network()


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 64, 32, generator=torch.Generator().manual_seed(5))


def test_target_feature_is_normalised_before_dropout() -> None:
    network = new_network()
    both = {"source": images(), "target": images()}
    outputs = network(both, AT)
    assert outputs["logits"].shape == (4, 7)
    # Entries are 0 or twice those of a unit vector, so a row's length is about sqrt(2), and never 1.
    network.target_dropout.probability = 0.0
    features, unit = outputs["features"], network(both, AT)["features"]
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))
    kept = features != 0
    torch.testing.assert_close(features[kept], 2 * unit[kept])
    assert 0.2 < kept.float().mean() < 0.8


def test_running_statistics_see_source_then_target() -> None:
    network, apart = new_network(), new_network()
    source, target = images(), 2 * images() + 1
    network({"source": source, "target": target}, AT)
    apart.embedding(apart.backbone(source))
    apart.embedding(apart.backbone(target))
    for (name, a), (_, b) in zip(network.named_buffers(), apart.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_epochs_on_the_source_alone_use_the_source_head() -> None:
    outputs = new_network()({"source": images()}, Step(3, -1, source_only=True))
    assert outputs.keys() == {"logits"}


def test_every_method_says_what_it_is() -> None:
    for name in METHODS:
        assert len(describe({"method": name, "loss.target_weight": 0.3})) > 20
    full = {"loss.target_weight": 0.3, "data.camera_style": True, "loss.num_neighbors": 6}
    assert "(E), camera-invariance (C) and neighbourhood-invariance (N, k = 6" in describe(full)
    assert describe({"loss.target_weight": 0}).startswith("Control")


def test_help_names_the_methods_and_heads_the_options_of_each() -> None:
    shown = build_parser("train", "").format_help()
    named = " ".join(shown.split()).partition("--method METHOD what is trained: ")[2].partition(" (type")[0]
    assert set(named.replace(" or ", ", ").partition(" (")[0].split(", ")) == set(METHODS)
    for name, entry in METHODS.items():
        assert entry.options is None or f"\nof method {name}:\n" in shown


def test_help_has_every_methods_options_with_what_they_mean() -> None:
    shown = " ".join(build_parser("train", "").format_help().split()).partition(" options: ")[2]
    for name, entry in METHODS.items():
        for option in dataclasses.fields(entry.options) if entry.options else ():
            _, found, rest = shown.partition(f"--{name}.{option.name} ")
            assert found, (name, option.name)
            meaning = rest.partition(" --")[0].partition("(type:")[0]
            assert len(meaning.split()) > 3, (name, option.name, meaning)
