"""The end of a run is whole or repeated, and a run that goes on after its end is the one that goes on."""

import json
from pathlib import Path

import pytest
import torch

from ecn_dist.config import load
from ecn_dist.models import fingerprint_backbone
from ecn_dist.reporting import figures
from ecn_dist.reporting.model_card import facts_of
from ecn_dist.training.checkpoint import CheckpointStore
from ecn_dist.training.signals import EXIT_PREEMPTED
from ecn_dist.training.trained import load_trained
from tests.integration.conftest import Domains
from tests.integration.training import loss_lines, train, train_on

# Ten steps, of both losses.
ONE_EPOCH = [
    *("--optim.source_only_epochs", "0", "--epochs", "1", "--checkpoint.keep", "9", "--logging.every_steps", "1"),
    *("--logging.tensorboard", "false"),
]


class Killed(BaseException):
    """No handler of the program's catches it."""


def train_until_figures(argv: list[str]) -> None:
    """The command, ended on this rank as by a kill when it is about to draw."""

    def ended(*_: object, **__: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_figures", ended)
        with pytest.raises(Killed):
            train(argv)


def fingerprint(path: Path) -> str:
    backbone, config = load_trained(path, torch.device("cpu"))
    return fingerprint_backbone(backbone, config.data.height, config.data.width)


def drawn(run: Path) -> set[str]:
    return {path.name for path in (*run.glob("figures/*"), *run.glob("report.html"))}


@pytest.mark.timeout(400)
def test_killed_at_the_end_and_continued_after_it(ranks, small_domains: Domains, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*small_domains.options, *ONE_EPOCH, "--output_dir", str(run)]
    ranks(2).run(train_until_figures, options)
    assert not drawn(run)

    # The next start makes up what is missing, and trains nothing.
    trained = loss_lines(run)
    assert train_on(ranks, 2, options) == {0}
    assert loss_lines(run) == trained
    assert {"report.html", "cmc.png", "failures.png", "findings.json"} <= drawn(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["steps"] == 10
    assert "has not ended" not in (run / "report.html").read_text()
    assert f"{100 * summary['evaluation']['mAP']:.1f}" in (run / "report.html").read_text()

    # Now there is nothing to do.
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.parent.name != "logs"}
    assert train_on(ranks, 2, options) == {0}
    assert {path: path.stat().st_mtime_ns for path in times} == times

    # A continuation that is refused is none, whatever it was allowed.
    allow = ["--resume_changed", "allow", "--epochs", "3"]
    finished, card = fingerprint(run), (run / "MODEL_CARD.md").read_text()
    assert finished in card
    before = {path: path.read_bytes() for path in times if path.parent == run}
    with pytest.raises(AssertionError, match="the step says nothing here"):
        train_on(ranks, 2, [*options, *allow, "--optim.source_only_epochs", "2"])
    assert {path: path.read_bytes() for path in before} == before

    # What goes on and is cut off is its newest checkpoint, with its own configuration, and without results.
    assert train_on(ranks, 2, [*options, *allow], stop_rank=0, stop_step=11) == {EXIT_PREEMPTED}
    assert not drawn(run)
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "logs",
        "metrics.jsonl",
    ]
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    assert newest.name > "step-00000010"
    assert fingerprint(run) == fingerprint(newest) != finished
    assert load(run / "config.yaml").epochs == 3
    assert facts_of(run).summary is None
