"""The run folder on several ranks: what one of them finds is raised on all, and hosts must share it."""

import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from ecn_dist import distributed
from ecn_dist.config import CheckpointConfig, Config, OptimConfig
from ecn_dist.errors import UserError
from ecn_dist.training.building import load_index
from ecn_dist.training.run import Run
from tests.dataset_folders import pack_folder, write_market


def error_of_claim(folders: list[Path]) -> str:
    with Run(Config(output_dir=str(folders[distributed.rank()])), {}) as run:
        with pytest.raises(UserError) as raised:
            run.claim()
        assert raised.value.on_all_ranks
    return str(raised.value)


def test_hosts_that_do_not_share_the_folder(ranks, tmp_path: Path) -> None:
    """Each rank with its own, in which another run has been before."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders[1:]:
        with Run(Config(output_dir=str(folder)), {}) as run:
            assert run.claim()
    (folders[1] / ".lock").write_text("process 1 on another host")
    said = set(ranks(2).run(error_of_claim, folders))
    assert len(said) == 1
    assert f"rank 1 on host {socket.gethostname()} does not see in {folders[1]}" in said.pop()


@pytest.mark.parametrize(
    ("options", "data", "said"),
    [
        ({"seed": 7}, "same", "seed: 0 -> 7"),
        ({"optim": OptimConfig(lr=0.5)}, "same", "optim.lr: 0.1 -> 0.5"),
        ({"checkpoint": CheckpointConfig(every_steps=3)}, "same", "checkpoint.every_steps: 0 -> 3"),
        ({"target": ""}, "same", "target: a path -> "),
        ({}, "other", "data of target: same -> other"),
    ],
)
def test_ranks_that_were_started_otherwise(ranks, options: dict, data: str, said: str, tmp_path: Path) -> None:
    given = Config(target="T", output_dir=str(tmp_path / "run"))
    errors = ranks(2).run(error_of_rank_1s, given, replace(given, **options), data)
    assert errors[0] == errors[1]
    assert f"rank 1 on host {socket.gethostname()} was started otherwise than rank 0: {said}" in errors[0]
    assert not (tmp_path / "run").exists()


def error_of_rank_1s(given: Config, other: Config, data: str) -> str:
    config, data = (given, "same") if distributed.is_main() else (other, data)
    with pytest.raises(UserError) as raised:
        Run(config, {"target": data}).claim()
    return str(raised.value)


def error_of_index(folders: list[str]) -> str:
    with pytest.raises(UserError) as raised:
        load_index(folders[distributed.rank()])
    return str(raised.value)


def test_other_data_of_one_rank_and_none(ranks, tmp_path: Path) -> None:
    data = write_market(tmp_path / "data", identities=2)
    for seed in (0, 1):
        pack_folder(data, tmp_path / str(seed), seed=seed)
    folders = [str(tmp_path / name) for name in ("0", "1", "none")]
    named = f"rank 1 on host {socket.gethostname()}"
    for error in ranks(2).run(error_of_index, folders[:2]):
        assert re.match(rf"{named} has other data under \S+ than rank 0", error)
    for error in ranks(2).run(error_of_index, folders[::2]):
        assert error.startswith(f"{named}: no such shard folder: {folders[2]}")


def check_claim_of_other_places(folder: Path) -> None:
    own = {"target": f"T{distributed.rank()}", "resume": ("auto", "never")[distributed.rank()]}
    with Run(Config(output_dir=str(folder), **own), {}) as run:
        assert run.claim()


def test_places_may_differ_between_hosts(ranks, tmp_path: Path) -> None:
    ranks(2).run(check_claim_of_other_places, tmp_path / "run")


def check_rank_0_cannot_remove(folder: Path) -> None:
    """What killed runs left and rank 0 cannot remove."""
    with Run(Config(output_dir=str(folder)), {}) as run:
        assert run.claim()
        if distributed.is_main():
            run.store.folder.mkdir()
            (run.store.folder / "tmp-step-00000001").touch()  # no folder
        with pytest.raises(UserError, match="tmp-step-00000001") as raised:
            run.checkpoint()
        assert raised.value.on_all_ranks


def test_an_error_of_rank_0_alone_is_raised_on_all(ranks, tmp_path: Path) -> None:
    ranks(2).run(check_rank_0_cannot_remove, tmp_path / "run")
    (tmp_path / "file").touch()
    assert len(set(ranks(2).run(error_of_claim, [tmp_path / "file"] * 2))) == 1
