"""The engines against each other: the same losses, the same plain state, and skipped steps alike on all ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.memory import ExemplarMemory
from ecn_dist.methods.base import Step
from ecn_dist.methods.ecn.method import ECN
from ecn_dist.models import convert_batchnorm
from ecn_dist.training.deepspeed_strategy import DeepSpeed
from ecn_dist.training.strategy import DataParallel, Strategy
from tests.networks import ecn_network

CPU = torch.device("cpu")
BATCH, DIM, IDENTITIES, EXEMPLARS, STEPS = 12, 16, 5, 24, 4
# Not half as large: of a 3x3 convolution of stride 2 over 2x1 pixels, torch 2.13's weight gradient in bf16 on the CPU
# has entries that were never written.
HEIGHT, WIDTH = 64, 32


def new_network() -> ECN:
    return ecn_network(height=HEIGHT, width=WIDTH, embedding_dim=DIM, num_identities=IDENTITIES)


def make(engine: str, precision: str = "fp32", seed: int = 0, adam: bool = False) -> Strategy:
    torch.manual_seed(seed)
    network = new_network()
    convert_batchnorm(network, "sync", CPU)
    optimizer: torch.optim.Optimizer
    if adam:
        groups = network.parameter_groups(lr=1e-3, backbone_lr=4e-4)
        # An eps of its default size would divide the rounding of gradients close to 0.
        optimizer = torch.optim.Adam(groups, weight_decay=5e-4, eps=1e-4)
    else:
        groups = network.parameter_groups(lr=0.05, backbone_lr=0.02, layer_decay=0.8)
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4, nesterov=True)
    network.train()
    if engine == "ddp":
        strategy = DataParallel(network, optimizer, precision=precision, device=CPU)
        strategy.begin_phase(source_only=False)
        return strategy
    stage = int(engine.removeprefix("zero-"))
    return DeepSpeed(network, optimizer, precision=precision, zero_stage=stage, device=CPU)


def run(strategy: Strategy, memory: ExemplarMemory, steps: range) -> list[list[float]]:
    """The losses of `steps` of the method, means over ranks; inputs are a function of the step."""
    losses = []
    b = BATCH // distributed.world_size()
    own = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        source, target = torch.randn(2, BATCH, 3, HEIGHT, WIDTH, generator=generator)
        labels = torch.randint(IDENTITIES, (BATCH,), generator=generator)[own]
        indices = torch.randint(EXEMPLARS, (BATCH,), generator=generator)[own]
        outputs = strategy.forward({"source": source[own], "target": target[own]}, Step(step, 0, False))
        features_bD = outputs["features"]
        loss_source = F.cross_entropy(outputs["logits"], labels)
        loss_target = memory.loss(features_bD, indices, 3)
        strategy.backward(0.7 * loss_source + 0.3 * loss_target)
        took_step = strategy.step(1.0 - 0.1 * step)
        memory.update(features_bD, indices, 0.1, skip=not took_step)
        pair = torch.stack([loss_source, loss_target]).detach()
        losses.append((distributed.all_reduce(pair) / distributed.world_size()).tolist())
    return losses


def plain(strategy: Strategy) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in strategy.state().items()}


def memory_of(engine: str) -> ExemplarMemory:
    return ExemplarMemory(EXEMPLARS, DIM)


def check_equal_to_ddp(engine: str) -> None:
    ddp, ddp_memory = make("ddp"), memory_of("ddp")
    other, other_memory = make(engine), memory_of(engine)
    expected = run(ddp, ddp_memory, range(STEPS))
    torch.testing.assert_close(run(other, other_memory, range(STEPS)), expected, rtol=1e-4, atol=1e-6)
    assert math.isfinite(expected[-1][0])
    torch.testing.assert_close(plain(other), plain(ddp), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(other_memory.full(), ddp_memory.full(), rtol=1e-3, atol=1e-5)


@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ["zero-0", "zero-1", "zero-2"])
def test_deepspeed_equals_ddp(ranks, engine: str) -> None:
    ranks(2).run(check_equal_to_ddp, engine)


def check_handed_over(first: str, second: str, adam: bool = False) -> None:
    """Half the steps under one engine, the rest under another that took over its state, and no state of its own."""
    unbroken, memory = make("ddp", adam=adam), memory_of("ddp")
    expected = run(unbroken, memory, range(STEPS))
    before, memory = make(first, adam=adam), memory_of(first)
    run(before, memory, range(STEPS // 2))
    after = make(second, seed=1, adam=adam)
    if adam:
        steps = {tensor.item() for key, tensor in plain(before).items() if key.startswith("optimizer.step.")}
        assert steps == {STEPS // 2}
    after.load_state(plain(before))
    torch.testing.assert_close(plain(after), plain(before), rtol=0, atol=0)
    rest = run(after, memory, range(STEPS // 2, STEPS))
    torch.testing.assert_close(rest, expected[STEPS // 2 :], rtol=1e-4, atol=1e-6)


@pytest.mark.deepspeed
@pytest.mark.parametrize(("first", "second"), [("ddp", "zero-2"), ("zero-1", "ddp"), ("zero-2", "zero-0")])
def test_state_is_the_same_under_either_engine(ranks, first: str, second: str) -> None:
    ranks(2).run(check_handed_over, first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ddp", "ddp"),
        *(
            pytest.param(*pair, marks=pytest.mark.deepspeed)
            for pair in (("ddp", "zero-2"), ("zero-1", "ddp"), ("zero-2", "zero-0"), ("zero-0", "zero-1"))
        ),
    ],
)
def test_state_of_adam_is_the_same_under_either_engine(ranks, first: str, second: str) -> None:
    ranks(2).run(check_handed_over, first, second, True)


def check_bf16_equal_to_ddp(engine: str) -> None:
    ddp, other = make("ddp", "bf16"), make(engine, "bf16")
    expected = run(ddp, memory_of("ddp"), range(2))
    torch.testing.assert_close(run(other, memory_of(engine), range(2)), expected, rtol=0.02, atol=0)
    assert all(tensor.dtype is not torch.bfloat16 for tensor in plain(other).values())


@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ["zero-0", "zero-2"])
def test_deepspeed_in_bf16(ranks, engine: str) -> None:
    ranks(2).run(check_bf16_equal_to_ddp, engine)


def check_overflow(engine: str, infinite_on: int | None) -> None:
    """An overflow, of the loss scale or of one rank's gradient: skipped on all ranks; later steps are taken."""
    strategy, memory = make(engine, "fp16"), memory_of(engine)
    state = strategy.state()
    if infinite_on is None:
        strategy.load_state(state | {"scaler": torch.tensor([2.0**60, 0.0], dtype=torch.float64)})
    elif infinite_on == distributed.rank():
        parameter = strategy.network.embedding.linear.weight
        handle = parameter.register_hook(lambda gradient: gradient / 0)
    before, rows = plain(strategy), memory.full()
    run(strategy, memory, range(1))
    after = plain(strategy)
    for key in before:  # BatchNorm's statistics are of the forward pass
        if key != "scaler" and not key.endswith(("running_mean", "running_var", "tracked")):
            assert torch.equal(before[key], after[key]), key
    assert torch.equal(memory.full(), rows)
    assert after["scaler"][0] == before["scaler"][0] / 2
    if infinite_on == distributed.rank():
        handle.remove()
    if infinite_on is not None:
        losses = run(strategy, memory, range(1, 3))
        assert all(math.isfinite(loss) for pair in losses for loss in pair)
        assert not torch.equal(memory.full(), rows)
        assert not torch.equal(plain(strategy)["network.source_head.weight"], before["network.source_head.weight"])


@pytest.mark.parametrize(
    "engine",
    ["ddp", pytest.param("zero-1", marks=pytest.mark.deepspeed), pytest.param("zero-2", marks=pytest.mark.deepspeed)],
)
@pytest.mark.parametrize("infinite_on", [None, 1])
def test_fp16_overflow_skips_the_step_on_all_ranks(ranks, engine: str, infinite_on: int | None) -> None:
    ranks(2).run(check_overflow, engine, infinite_on)


def check_local_statistics() -> None:
    torch.manual_seed(0)
    network = new_network()
    sgd = torch.optim.SGD(network.parameter_groups(lr=0.05, backbone_lr=0.02), momentum=0.9, nesterov=True)
    network.backbone.freeze(1, False)
    strategy = DataParallel(network.train(), sgd, precision="fp32", device=CPU)
    strategy.begin_phase(source_only=False)
    run(strategy, memory_of("ddp"), range(2))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items() if "running_" in key}
    state = plain(strategy)
    for key, own in before.items():
        of_all = distributed.all_gather_rows(own[None])
        if torch.equal(of_all[0], of_all[1]):
            assert "stem" in key  # the frozen stage
            assert torch.equal(state[f"network.{key}"], own)
        torch.testing.assert_close(state[f"network.{key}"], of_all.mean(0))
        assert torch.equal(network.state_dict()[key], state[f"network.{key}"])
    assert any("stem" not in key for key in before)


def test_local_batchnorm_has_one_network_to_save(ranks) -> None:
    ranks(2).run(check_local_statistics)


@pytest.mark.deepspeed
def test_deepspeed_says_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="fp64"):
        make("zero-1", "fp64")
    with pytest.raises(UserError, match="zero_stage"):
        make("zero-0", "fp16")
    with pytest.raises(UserError, match="torchrun"):
        make("zero-1")
