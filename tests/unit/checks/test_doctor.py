"""doctor on one host: what is well is found well, and each thing that is broken here is named with a remedy."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from ecn_dist import doctor
from ecn_dist.checks import host_checks
from ecn_dist.checks.host_checks import Finding, guarded
from ecn_dist.config import Config, DataConfig, dump
from ecn_dist.errors import UserError
from tests.dataset_folders import pack_folder, write_market

CPU = Config(device="cpu")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    pack_folder(write_market(root / "data"), root / "shards", camera_style="histogram")
    return root / "shards"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def only(findings: object) -> Finding:
    (finding,) = findings  # type: ignore[misc]
    return finding


def test_all_is_well(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--source", str(sound), "--target", str(sound), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    options += ["--global_batch_size", "12", "--data.streams", "12", "--data.height", "64", "--data.width", "32"]
    options += ["--model.arch", "small_resnet"]
    assert doctor.main([*options, "--model.weights", "none"]) == 0
    said = capsys.readouterr().out
    assert "all is well" in said
    assert "WRONG" not in said
    assert not (tmp_path / "run").exists()

    # What `train` would refuse at once.
    assert doctor.main([*options, "--model.weights", str(tmp_path / "absent.pth"), "--quiet"]) == 1
    assert "there is no file" in capsys.readouterr().out
    run, config = tmp_path / "other", Config(source="s", target="t", output_dir="o", seed=7)
    run.mkdir()
    (run / "config.yaml").write_text(dump(config))
    (run / "metrics.jsonl").write_text('{"step": 0, "epoch": 0}\n')
    assert doctor.main([*options, "--model.weights", "none", "--output_dir", str(run), "--only", "plan"]) == 1
    assert "already holds another run" in capsys.readouterr().out


def test_nothing_to_look_at_is_not_called_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--only", "all_reduce"]) == 0
    assert "nothing was looked at" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0", "-3", "two"])
def test_numbers_of_ranks_that_no_launcher_gives(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert doctor.main(["--only", "torch"]) == 2
    assert f"WORLD_SIZE is '{value}', and no whole number from 1 on" in capsys.readouterr().err


def test_a_lost_shard_and_an_impossible_plan(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = Path(shutil.copytree(sound, tmp_path / "shards"))
    (shards / "query-000000.tar").unlink()
    options = [
        "--source",
        str(sound),
        "--target",
        str(shards),
        "--output_dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--model.weights",
        "none",
    ]
    assert doctor.main([*options, "--global_batch_size", "13", "--quiet"]) == 1
    said = capsys.readouterr().out
    assert "query-000000.tar: No such file" in said
    assert "data.streams" in said
    assert said.count("WRONG") == said.count("remedy") == 2
    assert doctor.main([*options, "--global_batch_size", "13", "--quiet", "--only", "torch"]) == 0


def test_cut_shard_and_damaged_picture(sound: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(sound, tmp_path / "cut"))
    with (cut / "train-000000.tar").open("r+b") as file:
        file.truncate(2048)
    findings = list(host_checks.check_data(dataclasses.replace(CPU, source=str(cut), target=str(sound))))
    assert not findings[0].ok
    assert "2048 bytes, where the index says" in findings[0].text
    assert findings[1].ok
    damaged = Path(shutil.copytree(sound, tmp_path / "damaged"))
    size = (damaged / "train-000000.tar").stat().st_size
    (damaged / "train-000000.tar").write_bytes(bytes(size))
    finding = next(iter(host_checks.check_data(dataclasses.replace(CPU, source=str(damaged)))))
    assert "of split 'train'" in finding.text
    assert "cannot" in finding.text or "no picture" in finding.text


def test_too_little_shared_memory() -> None:
    finding = only(host_checks.check_shm(dataclasses.replace(CPU, global_batch_size=10**9, data=DataConfig(workers=4))))
    assert "--shm-size" in finding.remedy
    # Two batches ahead of each worker and one in use, of each domain, on the one rank.
    assert f"{2 * (4 * 2 + 1) * 10**9 * 256 * 128 * 3 >> 20} MiB" in finding.text
    assert only(host_checks.check_shm(dataclasses.replace(CPU, data=DataConfig(workers=0)))).ok


def test_output_folder_that_cannot_be_written() -> None:
    finding = only(host_checks.check_disk(dataclasses.replace(CPU, output_dir="/proc/self/runs"), None))
    assert not finding.ok


def test_disk_that_is_too_small(tmp_path: Path) -> None:
    config = dataclasses.replace(CPU, output_dir=str(tmp_path / "a" / "b"))
    assert only(host_checks.check_disk(config, 1)).ok
    assert "lower checkpoint.keep" in only(host_checks.check_disk(config, 2**60)).remedy


def test_accelerator_asked_for_and_not_there() -> None:
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this host has an accelerator")
    finding = only(host_checks.check_accelerator(dataclasses.replace(CPU, device="cuda")))
    assert "--gpus all" in finding.remedy


def test_unexpected_errors_become_findings() -> None:
    def fails() -> list[Finding]:
        raise UserError("the disk is on fire")

    assert "on fire" in only(guarded("disk", fails)).text


def test_help_and_unknown_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--only", "horoscope"]) == 2
    assert "no check horoscope" in capsys.readouterr().err
    assert doctor.main(["--min_bandwidth", "nan"]) == 2
    assert "min_bandwidth" in (said := capsys.readouterr().err)
    assert "v>0" in said
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--min_bandwidth" in said
    assert "--memory.momentum" in said
