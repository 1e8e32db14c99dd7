"""Checkpoints of many ranks: every rank writes its part, any number of ranks reads them, and all fail alike."""

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.distributed import RowPartition
from ecn_dist.errors import UserError
from ecn_dist.training.checkpoint import OF_RANKS, CheckpointStore, damage, load, read_meta


def full_rows(num_rows: int) -> Tensor:
    return torch.arange(num_rows * 3, dtype=torch.float64).view(num_rows, 3)


def make_state(num_rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """A state of rows shared out, a tensor and a number that all ranks hold, and something of each rank."""
    part = RowPartition(num_rows, distributed.world_size())
    own = slice(part.start(distributed.rank()), part.stop(distributed.rank()))
    rows = full_rows(num_rows)[own].clone()
    of_rank = distributed.as_row_sharded(torch.tensor([[10.0 + distributed.rank()]]), distributed.world_size())
    state = {
        "rows": distributed.as_row_sharded(rows, num_rows),
        "written": distributed.as_row_sharded(torch.arange(num_rows)[own].clone(), num_rows),
        "weight": torch.full((20, 5), 7.0),
        "count": torch.tensor(5),
        f"{OF_RANKS}interval": of_rank,
    }
    return state, rows


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def save(folder: Path, num_rows: int, asynchronous: bool) -> list[str]:
    state, rows = make_state(num_rows)
    store = CheckpointStore(folder, asynchronous=asynchronous)
    store.save(3, state, {"about": "test"})
    rows.zero_()  # what was handed over is what counts
    state["weight"].zero_()
    store.finish()
    assert not store.is_writing
    assert damage(folder / "step-00000003") is None
    return sorted(read_meta(folder / "step-00000003")["files"])


def check_load(folder: Path, num_rows: int, written_by: int) -> None:
    expected, _ = make_state(num_rows)
    state, _ = make_state(num_rows)
    for tensor in state.values():
        local(tensor).zero_()
    newest = CheckpointStore(folder).newest()
    assert newest is not None
    assert load(newest, state)["world_size"] == written_by
    for key in ("rows", "written", "weight", "count"):
        assert torch.equal(local(state[key]), local(expected[key])), key
    # What belongs to a rank comes back on as many ranks, and on no others.
    if written_by == distributed.world_size():
        assert local(state[f"{OF_RANKS}interval"]).item() == 10.0 + distributed.rank()
    else:
        assert f"{OF_RANKS}interval" not in state


@pytest.mark.parametrize("asynchronous", [False, True])
# 7 rows are uneven on 2 and 3 ranks; of 4 rows the third of three ranks has none.
@pytest.mark.parametrize("num_rows", [7, 4])
def test_any_number_of_ranks_reads_what_any_wrote(ranks, tmp_path: Path, num_rows: int, asynchronous: bool) -> None:
    save(tmp_path / "1", num_rows, asynchronous)
    for world_size in (2, 3):
        files = ranks(world_size).run(save, tmp_path / str(world_size), num_rows, asynchronous)
        assert len(files[0]) == world_size  # every rank wrote a part
    for written_by in (1, 2, 3):
        check_load(tmp_path / str(written_by), num_rows, written_by)
        for world_size in (2, 3):
            ranks(world_size).run(check_load, tmp_path / str(written_by), num_rows, written_by)


def check_full_disk_of_one_rank(folder: Path) -> None:
    state, _ = make_state(7)
    store = CheckpointStore(folder, asynchronous=True)
    store.save(1, state, {})
    store.finish()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    state["rows"] = distributed.as_row_sharded(torch.zeros(30_000, 1), 30_000 * distributed.world_size())
    store.save(2, state, {})
    store.finish()  # large enough, then, on a disk with room
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, unlimited[1]))
    try:
        store.save(3, state, {})
        with pytest.raises(UserError, match=r"step-00000003 could not be written .*earlier checkpoints") as raised:
            store.finish()
        assert raised.value.on_all_ranks
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    distributed.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert store.newest() == folder / "step-00000002"


def test_a_full_disk_of_one_rank_is_told_on_all(ranks, tmp_path: Path) -> None:
    ranks(2).run(check_full_disk_of_one_rank, tmp_path / "checkpoints")


def check_tensors_of_another_network(folder: Path) -> None:
    state, _ = make_state(7)
    CheckpointStore(folder).save(1, state, {})
    with pytest.raises(UserError, match=r"weight is \(20, 5\) and not \(5, 5\)"):
        load(folder / "step-00000001", {"weight": torch.zeros(5, 5)})


def test_tensors_of_another_network(ranks, tmp_path: Path) -> None:
    ranks(2).run(check_tensors_of_another_network, tmp_path)


def check_damaged_file(folder: Path, content: bytes) -> None:
    state, _ = make_state(7)
    CheckpointStore(folder).save(1, state, {})
    damaged = folder / "step-00000001" / "shard-00001-model-00001-of-00001.safetensors"
    assert distributed.together(lambda: damaged.is_file())
    if distributed.is_main():
        damaged = damaged.with_name("stray.safetensors") if content == b"stray" else damaged
        damaged.write_bytes(content or bytes(damaged.stat().st_size))
    distributed.barrier()
    name = "stray" if content == b"stray" else "shard-00001"
    with pytest.raises(UserError, match=rf"{name}\S* is damaged .*remove") as raised:
        load(folder / "step-00000001", state)
    assert raised.value.on_all_ranks


@pytest.mark.parametrize("content", [b"", b"rubbish", b"stray", b"\x02" + bytes(7) + b"[]"])
def test_a_damaged_file_is_named(ranks, tmp_path: Path, content: bytes) -> None:
    """Zeros of the right length, rubbish, a file that does not belong there, a header that is no header."""
    check_damaged_file(tmp_path / "1", content)
    ranks(2).run(check_damaged_file, tmp_path / "2", content)


def test_checksum(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert distributed.checksum(tmp_path / "file").startswith("ba7816bf8f01cfea")
