"""BatchNorm and dropout on many ranks against one process with the whole batch."""

import pytest
import torch
from torch import nn

from ecn_dist import distributed
from ecn_dist.models import Backbone, convert_batchnorm, reestimate_batchnorm
from ecn_dist.models.batchnorm import GlobalBatchNorm
from ecn_dist.models.dropout import GlobalDropout

CPU = torch.device("cpu")
IMAGES_A_RANK = 4


def own_part(batch: torch.Tensor) -> torch.Tensor:
    return batch.chunk(distributed.world_size())[distributed.rank()]


def global_batch(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(distributed.world_size() * IMAGES_A_RANK, *shape, generator=generator, dtype=torch.float64)
    return 3.0 * batch + 100.0  # far from zero, where E[x^2] - E[x]^2 would cancel


def new_norm(shape: tuple[int, ...]) -> nn.Module:
    norm = nn.BatchNorm2d(shape[0]) if len(shape) == 3 else nn.BatchNorm1d(shape[0])
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, shape[0]))
        norm.bias.copy_(torch.linspace(-1, 1, shape[0]))
    return norm.double()


def check_batchnorm_is_that_of_the_global_batch(shape: tuple[int, ...]) -> None:
    batch = global_batch(*shape)
    weights = torch.randn(batch.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole, part = new_norm(shape), convert_batchnorm(nn.Sequential(new_norm(shape)), "sync", CPU)[0]
    assert isinstance(part, GlobalBatchNorm) == (distributed.world_size() > 1)

    whole_input, part_input = batch.clone().requires_grad_(), own_part(batch).clone().requires_grad_()
    whole_output, part_output = whole(whole_input), part(part_input)
    (whole_output * weights).sum().backward()
    (part_output * own_part(weights)).sum().backward()

    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(part_output, own_part(whole_output), **close)
    torch.testing.assert_close(part_input.grad, own_part(whole_input.grad), **close)
    for name in ("weight", "bias"):
        summed = distributed.all_reduce(part.get_parameter(name).grad)
        torch.testing.assert_close(summed, whole.get_parameter(name).grad, **close)
    for (name, found), (_, wanted) in zip(part.named_buffers(), whole.named_buffers(), strict=True):
        torch.testing.assert_close(found, wanted, **close, msg=name)
    part.eval(), whole.eval()
    torch.testing.assert_close(part(own_part(batch)), own_part(whole(batch)), **close)


def check_local_mode_leaves_batchnorm_alone() -> None:
    assert type(convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), "local", CPU)[0]) is nn.BatchNorm1d


def check_frozen_stages(order: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone("resnet18", 32, 16).double()
    steps = [
        lambda: backbone.freeze(3, shortcut_batchnorm_trains=True),
        lambda: convert_batchnorm(backbone, "sync", CPU),
    ]
    for step in steps if order == "freeze first" else reversed(steps):
        step()
    backbone.train()
    before = {name: tensor.clone() for name, tensor in backbone.body.state_dict().items()}
    backbone(own_part(global_batch(3, 32, 16))).square().sum().backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad.sign()
    moved = {name for name, tensor in backbone.body.state_dict().items() if not torch.equal(tensor, before[name])}
    # The stem, layer1 and layer2 stand still, but for the statistics of layer2's shortcut.
    wanted = {f"layer2.0.downsample.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == wanted | {name for name in before if name.startswith(("layer3", "layer4"))}


def dropout_rows() -> torch.Tensor:
    dropout = GlobalDropout(0.5, seed=3, site=1)
    b = 12 // distributed.world_size()
    masks = [dropout(torch.ones(b, 50), step) for step in (0, 1)]
    assert not torch.equal(*masks)
    assert not torch.equal(masks[0], GlobalDropout(0.5, seed=3, site=0)(torch.ones(b, 50), 0))
    return distributed.all_gather_rows(masks[0])


def adapted_statistics() -> list[torch.Tensor]:
    torch.manual_seed(0)
    backbone = Backbone("small_resnet", 16, 8).double()
    convert_batchnorm(backbone, "sync", CPU)
    backbone.eval()
    batches = [torch.randn(12, 3, 16, 8, dtype=torch.float64) for _ in range(3)]
    parameters = [parameter.clone() for parameter in backbone.parameters()]
    reestimate_batchnorm(backbone, (own_part(batch) for batch in batches))
    assert all(torch.equal(a, b) for a, b in zip(parameters, backbone.parameters(), strict=True))
    assert not any(module.training for module in backbone.modules())
    return [buffer for name, buffer in backbone.named_buffers() if "running" in name]


@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)], ids=["1d", "2d"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_batchnorm_is_that_of_the_global_batch(ranks, world_size: int, shape: tuple[int, ...]) -> None:
    ranks(world_size).run(check_batchnorm_is_that_of_the_global_batch, shape)


def test_batchnorm_on_one_rank_is_torchs() -> None:
    check_batchnorm_is_that_of_the_global_batch((3, 4, 2))
    check_local_mode_leaves_batchnorm_alone()


@pytest.mark.parametrize("world_size", [2, 3])
def test_local_mode(ranks, world_size: int) -> None:
    ranks(world_size).run(check_local_mode_leaves_batchnorm_alone)


@pytest.mark.parametrize("order", ["freeze first", "convert first"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_frozen_stages_stand_still_on_any_number_of_ranks(ranks, world_size: int, order: str) -> None:
    ranks(world_size).run(check_frozen_stages, order)


@pytest.mark.parametrize("world_size", [2, 3])
def test_dropout_does_not_depend_on_the_ranks(ranks, world_size: int) -> None:
    whole = dropout_rows()
    assert 0.4 < (whole == 0).float().mean() < 0.6
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    for rows in ranks(world_size).run(dropout_rows):
        assert torch.equal(rows, whole)


@pytest.mark.parametrize("world_size", [2, 3])
def test_adapted_statistics_do_not_depend_on_the_ranks(ranks, world_size: int) -> None:
    wanted = adapted_statistics()
    for found in ranks(world_size).run(adapted_statistics):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
