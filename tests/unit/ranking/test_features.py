"""Extraction of features: views of a picture, types, the network's mode."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ecn_dist.models import Backbone, normalized_features
from ecn_dist.ranking import EvaluationInput, extract_features, extract_split
from tests.tiny_shards import write_split

CPU = torch.device("cpu")


@dataclass
class Batch:
    images: torch.Tensor
    pids: torch.Tensor
    camids: torch.Tensor
    indices: torch.Tensor


def test_several_views_of_a_picture_give_the_mean_of_unit_length() -> None:
    images, ids = torch.rand(6, 3, 4, 2, dtype=torch.float64), torch.arange(2).repeat_interleave(3)

    def embed(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)))

    found = extract_features(embed, [Batch(images, 10 + ids, 20 + ids, ids)], device=CPU)
    expected = torch.stack([embed(images[rows]).mean(0) for rows in (slice(0, 3), slice(3, 6))])
    torch.testing.assert_close(found.features, expected / expected.norm(dim=1, keepdim=True))
    assert (found.pids.tolist(), found.camids.tolist()) == ([10, 11], [20, 21])


def test_a_backbone_is_used_in_evaluation_mode_and_left_as_it_was(tmp_path: Path) -> None:
    split = write_split(tmp_path, [3, 2])
    backbone = Backbone("small_resnet", 16, 8).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    size = EvaluationInput(height=16, width=8, batch_size=2, workers=0)
    found = extract_split(backbone, split, size, device=CPU)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    plain = extract_split(lambda images: normalized_features(backbone.eval(), images), split, size, device=CPU)
    assert torch.equal(found.features, plain.features)
    assert found.features.dtype == torch.float32
    assert found.pids.tolist() == split.members["pid"].tolist()
