"""BatchNorm and dropout on many ranks against one process with the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, autocast, check_statistics, convert_batchnorm, reestimate_batchnorm
from ecn_dist.models.batchnorm import GlobalBatchNorm
from ecn_dist.models.layers import GlobalDropout, GlobalDropPath

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


def check_statisticsnorm_is_that_of_the_global_batch(shape: tuple[int, ...]) -> None:
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


def check_groups(images_a_rank: int, group: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
    """Outputs, gradients and statistics of groups are those of a plain BatchNorm called on each group, in one process.

    With a `dtype` below float64, the input comes under autocast, and parameters are float32.
    """
    ranks = distributed.world_size()
    batch = 3.0 * torch.randn(ranks * images_a_rank, *shape, generator=torch.Generator().manual_seed(1)).double() + 10.0
    batch = batch.to(dtype).double()
    weights = torch.randn(batch.shape, generator=torch.Generator().manual_seed(2)).double()
    part = convert_batchnorm(nn.Sequential(new_norm(shape)), "group", CPU, group)[0]
    part_input = own_part(batch).to(dtype).requires_grad_()
    if dtype != torch.float64:
        part.float()
    for _ in range(2):  # the second pass finds its layout kept
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float64):
            part_output = part(part_input)
    assert part_output.dtype == dtype
    (part_output * own_part(weights).to(dtype)).sum().backward()

    whole, whole_input = new_norm(shape), batch.clone().requires_grad_()
    means, variances = whole.running_mean, whole.running_var
    for _ in range(2):
        outputs, found = [], []
        for rows in whole_input.split(group):
            mean, variance = means.clone(), variances.clone()
            outputs.append(F.batch_norm(rows, mean, variance, whole.weight, whole.bias, training=True))
            found.append(torch.stack([mean, variance]))
        means, variances = torch.stack(found).mean(0)
    whole_output = torch.cat(outputs)
    (whole_output * weights).sum().backward()

    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0.03, "atol": 0.05}
    torch.testing.assert_close(part_output.double(), own_part(whole_output), **close)
    torch.testing.assert_close(part_input.grad.double(), own_part(whole_input.grad), **close)
    for name in ("weight", "bias"):
        summed = distributed.all_reduce(part.get_parameter(name).grad)
        torch.testing.assert_close(
            summed.double(),
            whole.get_parameter(name).grad,
            rtol=close["rtol"],
            atol=0.3 if dtype != torch.float64 else 1e-10,
        )
    torch.testing.assert_close(part.running_mean.double(), means, **close)
    torch.testing.assert_close(part.running_var.double(), variances, **close)
    assert part.num_batches_tracked == 2
    for value in (part.running_mean, part.running_var):  # to the last bit the same on all ranks
        assert (distributed.all_gather_rows(value[None]) == value).all()


def check_group_errors() -> None:
    ranks = distributed.world_size()
    norm = convert_batchnorm(nn.BatchNorm1d(3), "group", CPU, 5)
    with pytest.raises(UserError, match=f"5 does not divide a batch of {6 * ranks} pictures; these would do: 2, 3, "):
        norm(torch.randn(6, 3))
    norm.eval()(torch.randn(6, 3))
    with pytest.raises(UserError, match="group statistics need at least 2 pictures, and here they are of 1"):
        convert_batchnorm(nn.BatchNorm1d(3), "group", CPU, 1)(torch.randn(6, 3))


def check_frozen_stages(order: str, mode: str = "sync", precision: str = "fp64") -> None:
    torch.manual_seed(0)
    backbone = Backbone("resnet18", 64, 32)
    if precision == "fp64":
        backbone.double()
    steps = [
        lambda: backbone.freeze(3, shortcut_batchnorm_trains=True),
        lambda: convert_batchnorm(backbone, mode, CPU, 2 * distributed.world_size()),
    ]
    for step in steps if order == "freeze first" else reversed(steps):
        step()
    backbone.train()
    before = {name: tensor.clone() for name, tensor in backbone.body.state_dict().items()}
    images = own_part(global_batch(3, 64, 32))
    with autocast(precision, CPU):
        features = backbone(images if precision == "fp64" else images.float())
    features.double().square().sum().backward()
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


def dropped_paths() -> torch.Tensor:
    torch.manual_seed(3)
    path = GlobalDropPath(0.25)
    masks = torch.cat([path(torch.ones(120 // distributed.world_size(), 2, 3)) for _ in range(2)], 1)
    assert torch.equal(path.eval()(masks), masks)
    return distributed.all_gather_rows(masks)


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
    ranks(world_size).run(check_statisticsnorm_is_that_of_the_global_batch, shape)


def test_batchnorm_on_one_rank_is_torchs() -> None:
    check_statisticsnorm_is_that_of_the_global_batch((3, 4, 2))
    check_local_mode_leaves_batchnorm_alone()


@pytest.mark.parametrize("world_size", [2, 3])
def test_local_mode(ranks, world_size: int) -> None:
    ranks(world_size).run(check_local_mode_leaves_batchnorm_alone)


GROUPS = [
    (1, 4, 2),  # within the rank
    (1, 6, 6),
    (2, 6, 3),  # within a rank
    (2, 6, 6),  # equal to one's part
    (2, 6, 4),  # one group on both ranks
    (2, 6, 12),
    (3, 4, 6),  # a group begins in the middle of the second rank
    (3, 2, 3),
    (3, 4, 2),
    (3, 6, 9),
]


@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)], ids=["1d", "2d"])
@pytest.mark.parametrize(("world_size", "images_a_rank", "group"), GROUPS)
def test_groups_are_plain_batchnorms(ranks, world_size: int, images_a_rank: int, group: int, shape: tuple) -> None:
    ranks(world_size).run(check_groups, images_a_rank, group, shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("group", [3, 4])
def test_groups_under_autocast(ranks, group: int, dtype: torch.dtype) -> None:
    ranks(2).run(check_groups, 6, group, (3, 4, 2), dtype)


@pytest.mark.parametrize("world_size", [1, 2])
def test_groups_that_cannot_be_say_which_could(ranks, world_size: int) -> None:
    ranks(world_size).run(check_group_errors)


@pytest.mark.parametrize(
    ("mode", "batch", "message"),
    [
        ("sync", 1, r"sync statistics need at least 2 pictures, and here they are of 1 \(1 a pass on 1 ranks\)"),
        ("local", 1, "local statistics need at least 2"),
        ("group", 12, "7 does not divide a batch of 12 pictures; these would do: 2, 3, 4, 6, 12"),
    ],
)
def test_batches_that_cannot_be_normalised(mode: str, batch: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_statistics(mode, 7, batch, ranks=1)
    check_statistics(mode, 7, 14, ranks=2)


@pytest.mark.parametrize("mode", ["sync", "group", "local"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_freezing_precision_and_batchnorm_combine(ranks, mode: str, precision: str) -> None:
    ranks(2).run(check_frozen_stages, "freeze first", mode, precision)


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
def test_stochastic_depth_does_not_depend_on_the_ranks(ranks, world_size: int) -> None:
    whole = dropped_paths()
    assert whole.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert 0.15 < (whole == 0).float().mean() < 0.35
    assert torch.equal(whole[:, 0, 0], whole[:, 1, 2])  # whole pictures, anew at each call
    assert not torch.equal(whole[:, 0, 0], whole[:, 2, 0])
    for rows in ranks(world_size).run(dropped_paths):
        assert torch.equal(rows, whole)


def test_stochastic_depth_of_networks_is_drawn_for_the_global_batch() -> None:
    backbone = Backbone("efficientnet_b0", 64, 32)
    kinds = {type(module).__name__ for module in backbone.modules()}
    assert "GlobalDropPath" in kinds
    assert "StochasticDepth" not in kinds


@pytest.mark.parametrize("world_size", [2, 3])
def test_adapted_statistics_do_not_depend_on_the_ranks(ranks, world_size: int) -> None:
    wanted = adapted_statistics()
    for found in ranks(world_size).run(adapted_statistics):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
