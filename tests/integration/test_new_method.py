"""A new method is one file and one line in the table: it trains, resumes, evaluates and reports without more."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecn_dist.evaluate import main as evaluate
from ecn_dist.methods import METHODS, Entry
from ecn_dist.report import main as report
from ecn_dist.reporting.run_reader import read_metrics
from ecn_dist.train import main as train
from ecn_dist.training.trained import load_trained
from tests.dataset_folders import pack_folder, write_market
from tests.integration.conftest import Domains
from tests.integration.training import SHORT, assert_equal_runs, checkpoint_steps, final_tensors
from tests.toy_method import ToyOptions

TOY = Entry("tests.toy_method:Toy", options=ToyOptions, reads=("model.embedding_dim", "model.dropout"))
# The demo's file sets options of ECN, which the toy does not read.
NOT_ECN = ["--memory.momentum", "0.01", "--loss.neighbors_from_epoch", "5"]


@pytest.fixture
def toy(small_domains: Domains, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(METHODS, "toy", TOY)
    return [
        *small_domains.options,
        *SHORT,
        *NOT_ECN,
        "--checkpoint.every_steps",
        "5",
        "--method",
        "toy",
        "--toy.weight",
        "0.5",
    ]


@pytest.mark.timeout(300)
def test_a_method_of_one_file(toy: list[str], small_domains: Domains, tmp_path: Path, capsys) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train([*toy, "--output_dir", str(whole)]) == 0
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if "loss" in line]
    assert lines[0]["loss_distance"] is None  # on the source alone
    assert all(line["loss_distance"] > 0 for line in lines if line["epoch"] >= 0)
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["loss_source"] + 0.5 * lines[-1]["loss_distance"], rel=1e-5)

    assert train([*toy, "--output_dir", str(parts)]) == 0
    for step in checkpoint_steps(parts)[1:]:  # as if it had been killed in its last epoch
        for path in (parts / "checkpoints" / f"step-{step:08d}").iterdir():
            path.unlink()
    for name in ("summary.json", "weights.safetensors"):
        (parts / name).unlink()
    assert train([*toy, "--output_dir", str(parts)]) == 0
    assert_equal_runs(parts, whole)

    assert evaluate(["--checkpoint", str(whole), "--data", str(small_domains.target)]) == 0
    assert "mAP" in capsys.readouterr().out
    assert report(["--run", str(whole)]) == 0
    assert "pulls the domains together with weight 0.5" in (whole / "report.html").read_text()
    assert "pulls the domains together with weight 0.5" in (whole / "MODEL_CARD.md").read_text()


@pytest.mark.timeout(300)
def test_its_options_are_checked(toy: list[str], tmp_path: Path, capsys) -> None:
    assert train([*toy, "--output_dir", str(tmp_path), "--toy.wieght", "1"]) == 2
    assert "did you mean toy.weight" in capsys.readouterr().err
    assert train([*toy, "--output_dir", str(tmp_path), "--loss.num_neighbors", "3"]) == 2
    assert "loss.num_neighbors: method toy has no use for it" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_a_method_may_be_evaluated_by_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a momentum encoder: in the run, by its export and by its checkpoints."""
    mean_toy = Entry("tests.toy_method:MeanToy", options=ToyOptions, reads=TOY.reads)
    monkeypatch.setitem(METHODS, "toy", mean_toy)
    shards, run = tmp_path / "shards", tmp_path / "run"
    pack_folder(write_market(tmp_path / "data"), shards)
    small = {"global_batch_size": 6, "data.streams": 6, "data.height": 64, "data.width": 32, "data.workers": 0}
    small |= {"model.arch": "small_resnet", "model.weights": "none", "model.embedding_dim": 16}
    small |= {"optim.source_only_epochs": 1, "epochs": 1, "logging.tensorboard": False, "logging.figures": False}
    options = [f"--{key}={value}" for key, value in small.items()]
    assert (
        train([*options, "--method", "toy", f"--source={shards}", f"--target={shards}", "--output_dir", str(run)]) == 0
    )

    def backbone(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    alone, last = (run / "checkpoints" / f"step-{step:08d}" for step in checkpoint_steps(run))
    student, mean = (backbone(f"network.{part}backbone.", final_tensors(run)) for part in ("", "encoder.network."))
    assert not torch.equal(student["body.stem.0.weight"], mean["body.stem.0.weight"])
    for place in (run, last, alone):
        found = load_trained(place, torch.device("cpu"))[0].state_dict()
        assert found.keys() == mean.keys()
        for key, tensor in found.items():
            assert key.endswith("num_batches_tracked") or torch.equal(tensor, mean[key]), (place, key)
