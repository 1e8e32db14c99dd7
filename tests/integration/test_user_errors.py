"""Mistakes of a user: one clear text, on rank 0 only, exit status other than 0, nothing lost."""

import json
import shlex
import shutil
import socket
import sys
from pathlib import Path

import pytest

from ecn_dist.models import export_weights
from ecn_dist.train import main as train
from tests.integration.conftest import Domains, Torchrun
from tests.networks import source_network


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What `train` prints when it refuses `options`."""
    capsys.readouterr()
    assert train(list(options)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    return shown


def test_missing_shard_folder(small_domains: Domains, tmp_path: Path, capsys) -> None:
    options = [*small_domains.options, "--output_dir", str(tmp_path / "run"), "--target", str(tmp_path / "absent")]
    shown = error_of(capsys, *options)
    assert str(tmp_path / "absent") in shown
    assert "pack" in shown
    assert not (tmp_path / "run").exists()


def test_validation_data_that_cannot_choose(small_domains: Domains, validation: Path, tmp_path: Path, capsys) -> None:
    options = [*small_domains.options, "--output_dir", str(tmp_path / "run"), "--checkpoint.keep_best", "true"]
    absent, halved, copied = (tmp_path / name for name in ("absent", "halved", "copied"))
    shutil.copytree(validation, halved)
    index = json.loads((halved / "index.json").read_text())
    del index["splits"]["query"]
    (halved / "index.json").write_text(json.dumps(index))
    shutil.copytree(small_domains.target, copied)
    for folder, said in ((absent, "absent"), (halved, "must have query and gallery"), (copied, "the test's people")):
        assert said in error_of(capsys, *options, "--checkpoint.validation", str(folder))
    next(halved.glob("gallery-*.tar")).unlink()
    (halved / "index.json").write_bytes((validation / "index.json").read_bytes())
    assert "gallery-000000.tar" in error_of(capsys, *options, "--checkpoint.validation", str(halved))
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit(small_domains: Domains, tmp_path: Path, capsys) -> None:
    network = source_network("resnet18", embedding_dim=256, num_identities=20)
    export_weights(network, tmp_path / "weights.safetensors")
    options = [*small_domains.options, "--output_dir", str(tmp_path / "run")]
    shown = error_of(capsys, *options, "--model.weights", str(tmp_path / "weights.safetensors"))
    assert "does not fit small_resnet" in shown


def test_output_folder_of_another_run(small_domains: Domains, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    short = ["--epochs", "0", "--optim.source_only_epochs", "1", "--logging.figures", "false"]
    options = [*small_domains.options, *short, "--output_dir", str(run)]
    assert train(options) == 0
    before = (run / "summary.json").read_bytes()
    assert "0.06" in error_of(capsys, *options, "--optim.lr", "0.06")
    assert "already holds a run" in error_of(capsys, *options, "--resume", "never")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert "no run" in error_of(capsys, *small_domains.options, "--output_dir", str(tmp_path / "full"))
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
    assert (run / "summary.json").read_bytes() == before
    assert 0 <= json.loads(before)["evaluation"]["mAP"] <= 1


def test_style_copies_asked_for_and_not_there(small_domains: Domains, tmp_path: Path, capsys) -> None:
    options = [*small_domains.options, "--output_dir", str(tmp_path / "run"), "--target", str(small_domains.source)]
    assert "--camera_style histogram" in error_of(capsys, *options)


def test_ranks_that_do_not_divide_the_batch_speak_once(
    torchrun: Torchrun, small_domains: Domains, tmp_path: Path
) -> None:
    options = [*small_domains.options, "--output_dir", str(tmp_path / "run"), "--global_batch_size", "25"]
    finished = torchrun(2, "-m", "ecn_dist.train", *options, check=False)
    assert finished.returncode != 0
    spoken = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(spoken) == 1
    assert "25 does not divide by 2 ranks" in spoken[0]
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_host_before_the_ranks_meet_is_told_by_that_host(
    torchrun: Torchrun, small_domains: Domains, tmp_path: Path
) -> None:
    (tmp_path / "0.yaml").write_text("seed: 0\n")  # rank 1 lacks its file
    options = shlex.join([*small_domains.options, "--output_dir", str(tmp_path / "run")])
    line = f'exec {shlex.quote(sys.executable)} -m ecn_dist.train {options} --config "{tmp_path}/$RANK.yaml"'
    finished = torchrun(2, "--no-python", "bash", "-c", line, check=False)
    assert finished.returncode != 0
    spoken = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(spoken) == 1
    assert spoken[0].startswith(f"error: rank 1 on {socket.gethostname()}: ")
    assert "1.yaml" in spoken[0]
    assert "1.yaml" in finished.stderr.partition("Root Cause")[2], "torchrun's own report has it too"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss.num_neighbors", "241"], "the target has only 240 training pictures"),
        (["--memory.backend", "triton"], "triton"),
    ],
)
def test_a_memory_that_cannot_be_fails_before_the_first_step(
    small_domains: Domains, tmp_path: Path, capsys, options: list[str], message: str
) -> None:
    run = tmp_path / "run"
    assert message in error_of(capsys, *small_domains.options, "--output_dir", str(run), *options)
    assert not (run / "metrics.jsonl").exists()


def test_the_largest_seed_trains(small_domains: Domains, tmp_path: Path) -> None:
    short = ["--epochs", "0", "--optim.source_only_epochs", "1", "--logging.figures", "false"]
    options = [*small_domains.options, *short, "--output_dir", str(tmp_path / "run")]
    assert train([*options, "--seed", str(2**63 - 1)]) == 0
