"""The command `stylize`: killed and resumed to the bit, its files, and copies by a generator that is there."""

import inspect
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ecn_dist import stylize
from ecn_dist.data import ShardIndex
from ecn_dist.packing.validation import validate
from ecn_dist.styles.options import Config
from tests.integration.conftest import REPOSITORY
from tests.integration.training import checkpoint_steps, final_tensors, loss_lines
from tests.style_cases import as_options, narrow, pack_cameras


# What the small pictures leave to learn in seconds is little; more of it is measured in docs/ablation.md.
def main(argv: list[str]) -> int:
    """The command on a rank that is already there; its exit status."""
    return inspect.unwrap(stylize.main)(argv)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = pack_cameras(tmp_path_factory.mktemp("stylize"))
    return shards.parent


@pytest.fixture(scope="module")
def whole(ranks, folder: Path) -> Config:
    """Options of a run that was not cut off."""
    config = narrow(folder, output=str(folder / "whole"), output_dir="", steps=60, checkpoint_steps=5, log_steps=3)
    assert ranks(1).run(main, as_options(config)) == [0]
    return replace(config, output_dir=f"{config.output}-generator")


def digests(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_a_run_leaves(whole: Config, folder: Path) -> None:
    index, run = ShardIndex.load(whole.output), Path(whole.output_dir)
    assert validate(index) == []
    assert index.split("train").has_styles
    assert (
        ShardIndex.load(whole.data).split("train").missing_styles == 36 * 2
    )  # those that it was made of are as before
    assert checkpoint_steps(run) == [55, 60]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["styles"]["camera"].keys() == {"real", "histogram", "learnt"}
    with safe_open(run / "generator.safetensors", "pt") as file:
        card = json.loads(file.metadata()["shape"])
    assert card == {"cameras": ["1", "2", "3"], "height": 32, "width": 16, "channels": 4, "blocks": 1, "skip": False}
    for name in ("styles", "training"):
        with Image.open(run / "figures" / f"{name}.png") as image:
            assert image.width > 300
    lines = loss_lines(run)
    assert [line["step"] for line in lines if (line["step"] + 1) % 3 == 0] == list(range(2, 60, 3))


def test_killed_and_resumed_to_the_bit(whole: Config, folder: Path) -> None:
    config = replace(whole, output=str(folder / "broken"), output_dir=str(folder / "broken-run"))
    # Of a single process: that several ranks resume to the bit is in tests/distributed/test_styles.py.
    command = [sys.executable, "-m", "ecn_dist.stylize", *as_options(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    broken = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    deadline = time.monotonic() + 120
    while not list(Path(config.output_dir).glob("checkpoints/step-*1?")):
        assert broken.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    broken.kill()
    broken.wait()
    assert not (Path(config.output) / "index.json").exists()
    assert checkpoint_steps(Path(config.output_dir))[-1] < 60
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=120)
    first, second = Path(config.output_dir), Path(whole.output_dir)
    assert loss_lines(first) == loss_lines(second)
    # safetensors puts the meta data in any order.
    of_first, of_second = (load_file(run / "generator.safetensors") | final_tensors(run) for run in (first, second))
    assert of_first.keys() == of_second.keys()
    assert all(torch.equal(of_first[name], of_second[name]) for name in of_first)
    assert digests(Path(config.output)) == digests(Path(whole.output))


def test_a_run_that_ended_before_it_had_judged_its_copies_goes_on(whole: Config, folder: Path) -> None:
    (Path(whole.output_dir) / "summary.json").rename(folder / "summary.json")
    before = digests(Path(whole.output))
    assert stylize.main(as_options(whole)) == 0
    found, expected = (json.loads((run / "summary.json").read_text()) for run in (Path(whole.output_dir), folder))
    assert found["styles"] == expected["styles"]
    assert digests(Path(whole.output)) == before
    other = replace(whole, output_dir=str(folder / "other-run"), steps=5)
    assert stylize.main(as_options(other)) == 2  # which did not make these shards
    assert digests(Path(whole.output)) == before


def test_a_generator_that_diverges_in_the_last_step_writes_no_copies(folder: Path, capsys) -> None:
    """The losses are those before that step."""
    once = {"steps": 1, "critic_steps": 1, "cycle_weight": 1e9, "lr": 1e9}
    config = narrow(folder, output=str(folder / "diverged"), output_dir=str(folder / "diverged-run"), **once)
    assert stylize.main(as_options(config)) == 2
    assert "weights that are not finite; lower --lr" in capsys.readouterr().err
    assert not (folder / "diverged").exists()


def test_with_a_generator_that_is_there(ranks, whole: Config, folder: Path) -> None:
    generator = str(Path(whole.output_dir) / "generator.safetensors")
    again = replace(whole, output=str(folder / "again"), output_dir="", generator=generator)
    assert ranks(1).run(main, as_options(again)) == [0]
    tars = [path.name for path in (folder / "again").glob("*.tar")]
    assert {"train-000000.tar", "query-000000.tar"} < set(tars)
    assert digests(folder / "again") == digests(Path(whole.output))
    assert not (folder / "again-generator" / "checkpoints").exists()
