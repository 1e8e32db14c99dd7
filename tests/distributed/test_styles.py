"""Camera styles on 1, 2 and 3 ranks: the same losses, weights and shards; a resumed training is the same to the bit."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.data import ShardIndex
from ecn_dist.packing.validation import validate
from ecn_dist.styles.networks import Generator, Shape
from ecn_dist.styles.options import Config
from ecn_dist.styles.training import StyleTrainer
from ecn_dist.styles.writing import open_data, write_copies
from ecn_dist.training.checkpoint import CheckpointStore
from ecn_dist.training.signals import StopRequest
from tests.integration.training import loss_lines
from tests.style_cases import narrow, pack_cameras

CPU = torch.device("cpu")
Trained = dict[str, Tensor]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_cameras(tmp_path_factory.mktemp("styles"))


class StopAfter(StopRequest):
    """A request to stop that comes when it was asked for `calls` times, on rank 1 alone where there are several."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls if distributed.rank() == min(1, distributed.world_size() - 1) else 10**9

    def __bool__(self) -> bool:
        self.calls -= 1
        return self.calls < 0


def train(config: Config, stop_after: int | None = None, resumes: bool = False) -> Trained:
    """All tensors at the end of a training, or where it was stopped."""
    Path(config.output_dir).mkdir(exist_ok=True)
    trainer = StyleTrainer(config, open_data(config.data), CPU, {})
    if resumes:
        newest = CheckpointStore(Path(config.output_dir) / "checkpoints").newest()
        assert newest is not None
        trainer.resume(newest)
    assert trainer.fit(StopRequest() if stop_after is None else StopAfter(stop_after)) == (stop_after is None)
    return {name: tensor.clone() for name, tensor in trainer._state().items() if not name.startswith("ranks.")}


def test_world_size_is_a_detail(ranks, shards: Path, tmp_path: Path) -> None:
    """Losses and weights after 10 steps, 5 of them the generator's, in float64."""
    runs = {}
    for world_size in (1, 2, 3):
        config = narrow(
            shards.parent, output_dir=str(tmp_path / str(world_size)), precision="fp64", log_steps=1, lr=1e-3
        )
        runs[world_size] = ranks(world_size).run(train, config), loss_lines(tmp_path / str(world_size))
    (expected, *_), lines = runs[1]
    assert len(lines) == 10
    assert [line["step"] for line in lines if line["loss_cycle"] is not None] == [1, 3, 5, 7, 9]
    start = StyleTrainer(narrow(shards.parent, precision="fp64"), open_data(str(shards)), CPU, {})._state()
    assert all(
        (expected[f"network.{name}"] != start[f"network.{name}"]).any() for name in ("generator.layers.0.weight",)
    )
    for world_size in (2, 3):
        found, found_lines = runs[world_size]
        for line, of_one in zip(found_lines, lines, strict=True):
            assert {key: value or 0.0 for key, value in line.items()} == pytest.approx(
                {key: value or 0.0 for key, value in of_one.items()}, rel=1e-8
            ), world_size
        for of_rank in found:
            for name, tensor in expected.items():
                torch.testing.assert_close(of_rank[name], tensor, rtol=1e-6, atol=1e-9, msg=f"{name} on {world_size}")


@pytest.mark.parametrize("world_size", [1, 3])
def test_resumed_to_the_bit(ranks, shards: Path, tmp_path: Path, world_size: int) -> None:
    """Stopped between two lines of metrics, on the word of one rank."""
    whole, broken = (
        narrow(shards.parent, output_dir=str(tmp_path / name), log_steps=4) for name in ("whole", "broken")
    )
    expected = ranks(world_size).run(train, whole)
    ranks(world_size).run(train, broken, stop_after=7)
    assert CheckpointStore(tmp_path / "broken" / "checkpoints").newest().name == "step-00000007"
    resumed = ranks(world_size).run(train, broken, resumes=True)
    assert loss_lines(tmp_path / "broken") == loss_lines(tmp_path / "whole")
    for found, of_whole in zip(resumed, expected, strict=True):
        assert found.keys() == of_whole.keys()
        for name, tensor in of_whole.items():
            assert torch.equal(found[name], tensor), name


def test_wanted_cameras_and_draws(shards: Path) -> None:
    """Wanted cameras are those of the global batch in another order, and another one at each step."""
    trainer = StyleTrainer(narrow(shards.parent), open_data(str(shards)), CPU, {})
    for step in range(3):
        taken = trainer.split.camids[trainer.plan.step(step).rows_b]
        assert sorted(trainer.wanted(step)) == sorted(taken)
    assert trainer.wanted(0).tolist() != trainer.wanted(3).tolist()  # both of the same pass's length


def write(config: Config) -> None:
    index = open_data(config.data)
    torch.manual_seed(0)
    generator = Generator(Shape(index.cameras, 32, 16, channels=4, blocks=1)).double()
    write_copies(index, generator, config, CPU)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_ranks_share_the_writing(ranks, shards: Path, tmp_path: Path) -> None:
    """The same bytes on 1, 2 and 3 ranks, which are not those of more pictures or fewer."""
    for world_size in (1, 2, 3):
        ranks(world_size).run(write, narrow(shards.parent, output=str(tmp_path / str(world_size))))
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3")
    before, after = ShardIndex.load(str(shards)), ShardIndex.load(str(tmp_path / "1"))
    assert validate(after) == []
    assert after.about["camera_style"] == "learnt"
    assert after.split("train").has_styles
    assert {name: split.shard_samples for name, split in after.splits.items()} == {
        name: split.shard_samples for name, split in before.splits.items()
    }
    for name, split in before.splits.items():
        for column in ("index", "pid", "camid", "shard"):
            assert (after.split(name).members[column] == split.members[column]).all()
    assert digests(tmp_path / "1")["query-000000.tar"] == digests(shards)["query-000000.tar"]


def fails(config: Config, break_rank: int) -> str:
    """The error of `write` where one rank cannot write its copies."""
    from ecn_dist.errors import UserError
    from ecn_dist.styles import writing

    encode: Callable = writing.encode
    if distributed.rank() == break_rank:

        def full(image: object) -> bytes:
            raise OSError(28, "No space left on device")

        writing.encode = full
    try:
        with pytest.raises(UserError) as raised:
            write(config)
    finally:
        writing.encode = encode
    assert raised.value.on_all_ranks
    return str(raised.value)


def test_whole_or_not_at_all(ranks, shards: Path, tmp_path: Path) -> None:
    said = ranks(3).run(fails, narrow(shards.parent, output=str(tmp_path / "out")), 2)
    assert len(set(said)) == 1
    assert "No space left" in said[0]
    assert list((tmp_path / "out").iterdir()) == []
    said = ranks(2).run(fails, narrow(shards.parent, output=str(shards)), 9)
    assert all("already holds shards" in text for text in said)
