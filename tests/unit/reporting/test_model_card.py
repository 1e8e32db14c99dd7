"""The model card: what it says comes from the run, what is unknown is said to be, and no place of anybody's disk."""

from pathlib import Path

import pytest
import torch

from ecn_dist.config import flatten
from ecn_dist.data import ShardIndex
from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, fingerprint_backbone
from ecn_dist.reporting import model_card
from ecn_dist.reporting.model_card import Facts, card_of, describe_data, facts_of
from ecn_dist.training.trained import load_trained
from tests.report_cases import EVALUATION
from tests.trained_cases import write_trained_run

DOMAIN = {
    "layout": "market",
    "num_cameras": 6,
    "camera_style": "histogram",
    "splits": {
        "train": {"samples": 12936, "num_identities": 751, "distractors": 0},
        "gallery": {"samples": 15913, "num_identities": 751, "distractors": 2798},
    },
    "fingerprint": "ab" * 32,
}
SUMMARY = {
    "steps": 4321,
    "world_size": 2,
    "skipped_steps": 0,
    "evaluation": EVALUATION,
    "data": {"source": DOMAIN, "target": DOMAIN | {"fingerprint": "cd" * 32}},
    "machine": {"host": "annas-laptop"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("trained") / "run", summary=SUMMARY)


@pytest.fixture(scope="module")
def trained(run: Path) -> tuple[Backbone, dict]:
    backbone, config = load_trained(run, torch.device("cpu"))
    return backbone, flatten(config)


def test_the_card_says_what_the_run_left(run: Path, trained: tuple[Backbone, dict]) -> None:
    card = card_of(*trained, facts_of(run))
    assert f"`{fingerprint_backbone(trained[0], 64, 32)}`" in card
    assert "| mAP, trapezoid | 43.1 |" in card
    assert "| mAP, step-wise | 42.2 |" in card
    assert "| train | 751 | 12,936 | 0 |" in card
    assert "| gallery | 751 | 15,913 | 2,798 |" in card
    assert "ab" * 32 in card
    assert "cd" * 32 in card
    assert "Queries with a true match: 3,368" in card
    assert "- Steps: 4,321" in card
    assert "memory.temperature: 0.05" in card
    for words in ("biometric", "consent", "Not intended", "Limits", "not known", "64 x 32 pixels"):
        assert words in card
    sections = [line for line in card.splitlines() if line.startswith("## ")]
    assert len(sections) == len(set(sections)) == 8


def test_the_card_names_no_place_and_no_host(run: Path, trained: tuple[Backbone, dict]) -> None:
    backbone, options = trained
    for weights in ("/home/somebody/start.pth", "https://somebody:key@host/start.pth?token=secret", "pipe:cat /home/x"):
        card = card_of(backbone, options | {"model.weights": weights}, facts_of(run))
        for private in ("/home", "annas-laptop", str(run), "secret", "key@"):
            assert private not in card
        assert "data of their own, which are not listed" in card


def test_names_from_data_are_no_markup(run: Path, trained: tuple[Backbone, dict]) -> None:
    name = "x`\n# Forged\n\x1b[2J<img src=x> | [y](z)"
    split = {"samples": 1, "num_identities": 1, "distractors": 0}
    hostile = DOMAIN | {"layout": name, "camera_style": name, "splits": {name: split}, "fingerprint": name}
    card = card_of(*trained, Facts(SUMMARY | {"data": {"source": hostile, "target": hostile}}))
    lines = card.splitlines()
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.startswith("# Forged")]
    assert r"x'\n# Forged\n\x1b\[2J&lt;img src=x> \| \[y](z)" in card
    assert "x`" not in card


def test_what_is_unknown_is_said(run: Path, trained: tuple[Backbone, dict], tmp_path: Path) -> None:
    for name in ("older.safetensors", "published.pth"):
        (run / name).touch()
    for facts, says in (
        (facts_of(run / "checkpoints" / "step-5"), "checkpoint within a run"),
        (facts_of(run / "older.safetensors"), "another file than"),
        (facts_of(run / "published.pth", run / "config.yaml"), "another file than"),
        (facts_of(tmp_path / "weights.safetensors", run / "config.yaml"), "apart from their run folder"),
        (facts_of(write_trained_run(tmp_path / "unfinished")), "no summary.json"),
        (Facts({"steps": 3}), "no target with query and gallery"),
    ):
        card = card_of(*trained, facts)
        assert f"Unknown. {says}" in card or says in card.split("## Results")[1].split("## Limits")[0]
        assert "43.1" not in card
        assert "unknown; the run did not record it" in card
    assert facts_of(run / "weights.safetensors").summary == SUMMARY
    assert facts_of(run, run / "config.yaml").summary == SUMMARY


def test_a_broken_summary_is_an_error(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path / "run")
    for broken in ("{", "[]"):
        (run / "summary.json").write_text(broken)
        with pytest.raises(UserError, match=r"summary\.json"):
            facts_of(run)


def test_data_are_described_from_the_index() -> None:
    split = {"samples": 7, "num_identities": 3, "distractors": 1, "shards": [], "identities": [4, 5, 6]}
    about = {"layout": "duke", "camera_style": "none", "splits": {"train": split}}
    index = ShardIndex("/home/somebody/duke", "duke", 8, tuple("12345678"), {}, about)
    assert describe_data(index) == {
        "layout": "duke",
        "num_cameras": 8,
        "camera_style": "none",
        "splits": {"train": {"samples": 7, "num_identities": 3, "distractors": 1}},
        "fingerprint": model_card.fingerprint(index),
    }


def test_the_card_is_written_whole(run: Path, trained: tuple[Backbone, dict], tmp_path: Path) -> None:
    path = tmp_path / model_card.NAME
    model_card.write_card(path, *trained, facts_of(run))
    assert path.read_text() == card_of(*trained, facts_of(run))
    assert list(tmp_path.iterdir()) == [path]
