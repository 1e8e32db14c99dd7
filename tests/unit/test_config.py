"""Configuration: files and options, and mistakes a user can make in the first second."""

import importlib
import itertools
import re
from pathlib import Path

import pytest
import yaml

from ecn_dist import config as configuration
from ecn_dist.config import Config
from ecn_dist.errors import UserError

REPOSITORY = Path(__file__).parents[2]
PLACES = ["--source", "s", "--target", "t", "--output_dir", "o"]


def parse(*argv: str) -> Config:
    return configuration.parse(list(argv), "train", "")


def test_options_override_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("epochs: 7\nmemory:\n  momentum: 0.02\n")
    config = parse("--config", str(tmp_path / "run.yaml"), "--memory.momentum", "0.03")
    assert (config.epochs, config.memory.momentum, config.memory.temperature) == (7, 0.03, 0.05)


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    config = parse(*PLACES, "--precision", "bf16", "--loss.target_weight", "0")
    (tmp_path / "config.yaml").write_text(configuration.dump(config))
    assert configuration.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("memory.momentun", "memory.momentum"), ("epoch", "epochs"), ("los.num_neighbors", "loss.num_neighbors")],
)
def test_unknown_option_names_the_nearest(given: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"unknown option '{given}'; did you mean {nearest}"):
        parse(f"--{given}", "1")


@pytest.mark.parametrize(("text", "nearest"), [("memory: {temprature: 1}", "memory.temperature"), ("sed: 1", "seed")])
def test_unknown_key_in_a_file_names_the_nearest(text: str, nearest: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=f"did you mean {nearest}"):
        parse("--config", str(tmp_path / "run.yaml"))


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# memory:\n", "is empty"),
        (b"null", "'null', where options by name are needed"),
        (b"[1, 2]", "a list, where options by name are needed"),
        (b"epochs: 1\nmemory:\n  # momentum: 0.1\n", "memory is empty"),
        (b"memory: 3", "memory is '3', where options by name are needed"),
        (b"memory: {momentum: 0.5}\nloss: {}\nmemory: {temperature: 0.1}\n", "memory stands twice"),
        (b"memory:\n  momentum: 0.5\n  momentum: 0.1\n", "memory.momentum stands twice"),
        (b"memory: [", "no YAML"),
        (b"seed: 0b_", "no YAML that can be read"),
        (b"seed: " + b"1" * 5000, "no YAML that can be read"),
        (b"\x00", "no YAML"),
        (b"? [epochs]\n: 3\n", "unhashable key"),
        (b"data: {? {workers: 1} : 3}\n", "unhashable key"),
        (b"a: " + b"[" * 100_000, "nested too deep"),
        ("epochs: 3".encode("utf-16"), "UTF-8"),
        ("# Stra\u00dfe".encode("latin-1"), "UTF-8"),
        (BOMB.encode(), "alias"),
        (b"sed: 1", "unknown option 'sed'; did you mean seed"),
        (b"memory: {temprature: 1}", "unknown option 'memory.temprature'; did you mean memory.temperature"),
        (b"epochs: many", "epochs"),
        (b"seed:\n", "seed is empty; give it a value"),
        (b"optim: {lr: null}", "optim.lr is empty; give it a value"),
        (b"model: {std: !!binary aGVq}", "model.std is of YAML's type !!binary"),
        (b"model: {std: !!set {0.1, 0.2, 0.3}}", "model.std is of YAML's type !!set"),
    ],
    ids=range(25),
)
def test_a_file_that_cannot_be_used_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"run\.yaml: (.|\n)*{message}"):
        parse("--config", str(file))
    with pytest.raises(UserError, match=rf"run\.yaml: (.|\n)*{message}"):
        configuration.load(file)


@pytest.mark.parametrize("name", ["", "absent.yaml", "."])
def test_config_that_is_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--config: there is no file '{name}'"):
        parse("--config", name)


def test_a_file_of_another_editor_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("epochs: 3  # \u00fcbung\r\n".encode("utf-8-sig"))
    assert parse("--config", str(tmp_path / "run.yaml")).epochs == 3


@pytest.mark.parametrize("options", [["--memory", "3"], ["--memory", "null"]])
def test_a_section_is_no_value(options: list[str]) -> None:
    with pytest.raises(UserError, match="memory"):
        parse(*options)


def test_wrong_type_names_the_key() -> None:
    with pytest.raises(UserError, match="epochs"):
        parse("--epochs", "many")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "epochs: 0 must be above 0"),
        (["--global_batch_size", "0"], "global_batch_size: 0 must be at least 1"),
        (["--memory.momentum", "0.02", "--epochs", "51"], "must stay below 1"),
        (["--loss.target_weight", "1"], "below 1"),
        (["--optim.momentum", "2"], "optim.momentum: 2.0 must be at least 0 and below 1"),
        (["--optim.lr", "-1"], "optim.lr: -1.0 must be above 0"),
        (["--optim.lr", ".nan"], "optim.lr: nan must be above 0"),
        (["--optim.weight_decay", ".inf"], "optim.weight_decay: inf"),
        (["--optim.warmup_epochs", "-1"], "optim.warmup_epochs: -1.0 must be at least 0"),
        (["--data.random_erasing", "7"], "random_erasing: 7.0 must be at least 0 and at most 1"),
        (["--checkpoint.keep_epochs", "[3, -1]"], "checkpoint.keep_epochs: -1 must be at least 0"),
        (["--seed", "-1"], "seed: -1 must be at least 0"),
        (["--global_batch_size", str(10**12)], "global_batch_size: 10{12} must be at least 1 and at most"),
        (["--model.embedding_dim", "1000000"], "model.embedding_dim: 1000000 must be at least 1 and at most 65536"),
        (["--optim.lr", "1e39"], r"optim.lr: 1e\+39 must be above 0 and at most 1e\+09"),
        (["--optim.weight_decay", "1e39"], "optim.weight_decay: .* at most"),
        (["--timeout_seconds", "1e18"], "timeout_seconds: .* at most"),
        (["--data.height", "100000"], "data.height: 100000 must be at least 1 and at most 2048"),
        (["--model.arch", "a\0b"], r"model.arch: 'a\\x00b' has a NUL"),
        (["--output_dir", "a\0b"], r"output_dir: 'a\\x00b' has a NUL"),
        (["--seed", str(2**63)], "seed: .* below 9.22337e"),
        (["--model.weights", "none", "--model.frozen_stages", "3"], "would stay random"),
    ],
)
def test_impossible_values_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(*PLACES, *options).check()


def test_missing_place_is_named() -> None:
    with pytest.raises(UserError, match="target: is not set"):
        parse("--source", "s", "--output_dir", "o").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "enc"], "method: 'enc' is unknown; did you mean ecn"),
        (["--method", "source_only", "--loss.num_neighbors", "3"], "loss.num_neighbors: method source_only has no use"),
        (["--method", "source_only", "--data.camera_style", "false"], "data.camera_style: method source_only"),
        (["--model.batchnorm", "group"], "model.batchnorm_group: 0 with model.batchnorm group"),
        (["--model.batchnorm_group", "4"], "model.batchnorm_group: 4 with model.batchnorm sync"),
        (["--checkpoint.keep_best", "true"], "checkpoint.keep_best: .*as checkpoint.validation"),
        (["--optim.step_epoch", "[20, -1]"], "optim.step_epoch: -1 must be at least 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(*PLACES, *options).check()


def test_a_method_needs_its_own_domains_alone() -> None:
    parse("--method", "source_only", "--source", "s", "--output_dir", "o").check()
    parse(*PLACES, "--method", "source_only", "--optim.step_epoch", "[20, 40]").check()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_hold(path: Path) -> None:
    options = [] if yaml.safe_load(path.read_text()).get("source") else PLACES
    parse("--config", str(path), *options).check()


@pytest.mark.parametrize("command", ["train", "doctor", "stylize"])
def test_help_is_for_people(command: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"ecn_dist.{command}").main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == f"usage: ecn-dist {command} [--KEY VALUE ...]"
    for of_python in ("Annotated", "Literal", "type: str", "<class", "e+0"):
        assert of_python not in shown
    height = re.search(r"--(data\.)?height HEIGHT +(.*)", shown)
    assert height is not None
    assert "(type: a whole number at least " in height[2]
    assert "at most 2048, default: " in height[2]
