"""Checkpoints of the method's published code, as its own `save_checkpoint` lays them out."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ecn_dist.errors import UserError
from ecn_dist.methods.source_only import SourceOnly
from ecn_dist.models import load_backbone, load_published_memory, load_weights
from tests.networks import source_network

DIM, IDENTITIES, EXEMPLARS = 24, 7, 11


def network(seed: int) -> SourceOnly:
    torch.manual_seed(seed)
    made = source_network("resnet18", embedding_dim=DIM, num_identities=IDENTITIES)
    for buffer in made.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return made


def published(trained: SourceOnly, prefix: str) -> dict[str, Tensor]:
    """The state dict of the published network, whose backbone keeps torchvision's unused classifier."""
    names = {
        "backbone.body.": "base.",
        "embedding.linear.": "feat.",
        "embedding.batchnorm.": "feat_bn.",
        "source_head.": "classifier.",
    }
    state = {prefix + "base.fc.weight": torch.zeros(1000, 512), prefix + "base.fc.bias": torch.zeros(1000)}
    for key, tensor in trained.state_dict().items():
        ours = next(name for name in names if key.startswith(name))
        state[prefix + names[ours] + key.removeprefix(ours)] = tensor
    return state


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pth.tar"
    rows_ND = nn.functional.normalize(torch.randn(EXEMPLARS, DIM))
    states = {"state_dict": published(network(1), ""), "state_dict_inv": {"em": nn.Parameter(rows_ND)}}
    torch.save(states | {"epoch": 60}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("counts_batches", [True, False])
def test_as_a_start(tmp_path: Path, prefix: str, counts_batches: bool) -> None:
    trained, started = network(1), network(2)
    state = published(trained, prefix)
    if not counts_batches:
        state = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "epoch": 60}, tmp_path / "checkpoint.pth.tar")
    assert load_weights(started, str(tmp_path / "checkpoint.pth.tar")) == []
    for key, tensor in trained.state_dict().items():
        assert torch.equal(started.state_dict()[key], tensor), key


def test_for_evaluation(checkpoint: Path) -> None:
    trained, backbone = network(1).backbone, network(2).backbone
    load_backbone(backbone, str(checkpoint))
    images = torch.randn(2, 3, 64, 32)
    assert torch.equal(backbone.eval()(images), trained.eval()(images))


def test_memory(checkpoint: Path) -> None:
    rows_ND = load_published_memory(str(checkpoint), EXEMPLARS, DIM)
    assert rows_ND.norm(dim=1).sub(1).abs().max() < 1e-6
    assert not rows_ND.requires_grad
    with pytest.raises(UserError, match=r"\(11, 24\).*\(12, 24\)"):
        load_published_memory(str(checkpoint), EXEMPLARS + 1, DIM)


def test_memory_that_is_not_there(tmp_path: Path) -> None:
    torch.save({"state_dict": published(network(1), "")}, tmp_path / "network.pth")
    with pytest.raises(UserError, match="has no memory"):
        load_published_memory(str(tmp_path / "network.pth"), EXEMPLARS, DIM)
    with pytest.raises(UserError, match="there is no file"):
        load_published_memory("imagenet", EXEMPLARS, DIM)


@pytest.mark.parametrize("memory", [{"em": "rows"}, {"em": torch.ones(11, 24, dtype=torch.int8)}, {7: None}, [1]])
def test_memory_that_is_none(tmp_path: Path, memory: object) -> None:
    torch.save({"state_dict_inv": memory}, tmp_path / "network.pth")
    with pytest.raises(UserError, match="has no memory"):
        load_published_memory(str(tmp_path / "network.pth"), 11, 24)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": {}, "state_dict_inv": {"em": Trap()}}, tmp_path / "trap.pth.tar")
    with pytest.raises(UserError, match="cannot be read"):
        load_published_memory(str(tmp_path / "trap.pth.tar"), EXEMPLARS, DIM)
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(network(1), str(tmp_path / "trap.pth.tar"))
    assert not (tmp_path / "sprung").exists()
