"""Packing into a folder that is not empty: refused, replaced as a whole, by one process at a time."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ecn_dist.errors import UserError
from ecn_dist.processes import run_jobs
from tests.dataset_folders import folder_bytes, pack_folder, write_market


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("market"))


def fail_after(shards: int, error: type[BaseException]):  # a `run_jobs`
    def run(function, jobs: list, workers: int, description: str) -> None:
        run_jobs(function, jobs[:shards], workers, description)
        raise error

    return run


def test_full_folder_is_refused_unless_overwritten(market: Path, tmp_path: Path) -> None:
    pack_folder(market, tmp_path, min_shards=4)
    with pytest.raises(UserError, match=r"already holds shards \(index\.json, .*--overwrite"):
        pack_folder(market, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    pack_folder(market, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [
        f"{split}-000000.tar" for split in ("gallery", "query", "train")
    ]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pack_leaves_nothing(
    market: Path, tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecn_dist.packing.shards.run_jobs", fail_after(3, error))
    with pytest.raises(error):
        pack_folder(market, tmp_path, min_shards=4)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_the_old_shards(
    market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_folder(market, tmp_path)
    before = folder_bytes(str(tmp_path))
    monkeypatch.setattr("ecn_dist.packing.shards.run_jobs", fail_after(3, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack_folder(market, tmp_path, overwrite=True, min_shards=4)
    assert folder_bytes(str(tmp_path)) == before


@pytest.mark.parametrize("moves", range(7))
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_shards_half_replaced_are_replaced_in_the_end(
    market: Path, tmp_path: Path, moves: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt waits for the end; what a kill leaves (here: another exception), the next pack makes good."""
    pack_folder(market, tmp_path / "new", min_shards=1)
    pack_folder(market, output := tmp_path / "old", min_shards=4, seed=5)
    replace, left = Path.replace, iter(range(moves))

    def cut_off(path: Path, to: Path) -> Path:
        if path.parent.name == ".packed" and next(left, None) is None:
            monkeypatch.setattr(Path, "replace", replace)
            raise error
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", cut_off)
    with pytest.raises(error):
        pack_folder(market, output, overwrite=True, min_shards=1)
    if error is SystemExit:
        assert not (output / "index.json").exists()
        with pytest.raises(UserError, match="already holds shards"):
            pack_folder(market, output, min_shards=1)
    assert folder_bytes(str(output)) == folder_bytes(str(tmp_path / "new"))
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in (tmp_path / "new").iterdir())


def test_a_killed_pack_is_no_obstacle(market: Path, tmp_path: Path) -> None:
    (tmp_path / ".packing-x").mkdir()
    (tmp_path / ".packing-x" / "train-000099.tar").write_bytes(b"half")
    (tmp_path / ".packing.lock").write_text("process 1 on host")
    pack_folder(market, tmp_path)
    assert not list(tmp_path.rglob("*99.tar"))
    assert not list(tmp_path.glob(".packing*"))


@pytest.mark.timeout(120)
def test_one_pack_at_a_time(market: Path, tmp_path: Path) -> None:
    """Another process holds the output, is told with its host, and leaves it when it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from ecn_dist.packing.shards import _only_packer\n"
        "with _only_packer(Path(sys.argv[1])): print('held', flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"is being packed by process {other.pid} on {socket.gethostname()}"):
            pack_folder(market, tmp_path)
        other.kill()
    pack_folder(market, tmp_path)
    assert not list(tmp_path.glob(".packing*"))
