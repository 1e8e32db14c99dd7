"""The files of continuous integration: they parse, and name what is there."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
WORKFLOW = REPOSITORY / ".github" / "workflows" / "ci.yml"
HOOKS = REPOSITORY / ".pre-commit-config.yaml"
SCRIPT = REPOSITORY / ".ci" / "run"


def jobs() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def targets_in(text: str) -> list[str]:
    calls = re.findall(r"\bmake ((?:[a-z-]+ ?)+)", text)
    return [target for call in calls for target in call.split()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def test_every_make_target_that_is_named_exists() -> None:
    hooks = [hook["entry"] for repo in yaml.safe_load(HOOKS.read_text())["repos"] for hook in repo["hooks"]]
    named = [target for job in jobs().values() for command in commands(job) for target in targets_in(command)]
    of_hooks = [target for entry in hooks for target in targets_in(entry)]
    assert {"lint", "test", "test-cluster"} <= set(named) <= make_targets()
    assert set(of_hooks) == {"lint-python", "lint-scripts"} <= make_targets()


def test_the_workflow_does_what_the_script_does() -> None:
    """The same parts, each with the same targets, and the packages of its own part before them."""
    parts = dict(re.findall(r"^    (\w+)\) make ([a-z -]+) ;;$", SCRIPT.read_text(), re.MULTILINE))
    assert parts.keys() == jobs().keys()
    for part, job in jobs().items():
        packages, *runs = commands(job)
        assert packages == f"sudo -E .ci/run packages {part}"
        assert [target for command in runs for target in targets_in(command)] == parts[part].split()


def test_supported_pythons_are_tested() -> None:
    versions = jobs()["test"]["strategy"]["matrix"]["python-version"]
    assert all(isinstance(version, str) for version in versions)  # 3.10 without quotes would be 3.1
    least = re.search(r'requires-python = ">=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert least
    assert versions[0] == least.group(1)


@pytest.mark.parametrize("arguments", [["nonsense"], ["packages", "lint", "tests"]])
def test_a_part_that_is_none_is_refused_before_anything_is_installed(arguments: list[str]) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"no such part: {arguments[-1]} (lint, test, cluster)" in done.stderr
    assert not done.stdout
