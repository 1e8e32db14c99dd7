"""A small training run on the hosts of a bench, by launch/torchrun_multinode.sh, and what it leaves."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.benches import REPOSITORY, Hosts, Job, wait_until
from tests.integration.conftest import Domains

TIMEOUT_SECONDS = 10  # of a collective
START_SECONDS = 180  # to be patient with a busy machine
SCRIPT = REPOSITORY / "launch" / "torchrun_multinode.sh"


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    options: list[str]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    @property
    def losses(self) -> dict[int, float]:
        """By step, as exact as they were written."""
        return {line["step"]: line["loss"] for line in self.metrics}

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def checkpoints(self) -> list[int]:
        folder = self.folder / "checkpoints"
        return sorted(int(p.name[5:]) for p in folder.glob("step-*") if (p / "meta.json").is_file())

    def reaches(self, step: int, jobs: list[Job]) -> None:
        """Wait until `step` is in the metrics."""

        def reached() -> bool:
            assert all(job.running for job in jobs), "\n".join(job.text() for job in jobs)
            lines = self.metrics
            return bool(lines) and lines[-1]["step"] >= step

        wait_until(reached, START_SECONDS, f"step {step}", lambda: "\n".join(job.text() for job in jobs))


def small_run(domains: Domains, folder: Path, *options: str, epochs: int = 3) -> Run:
    """10 steps an epoch, every one of them reported, a checkpoint every 5."""
    recipe = ["--optim.source_only_epochs", "0", "--epochs", str(epochs), "--device", "cpu", "--optim.lr", "0.01"]
    recipe += ["--timeout_seconds", str(TIMEOUT_SECONDS), "--logging.every_steps", "1", "--checkpoint.every_steps", "5"]
    recipe += ["--logging.tensorboard", "false", "--logging.figures", "false"]
    return Run(folder, [*domains.options, *recipe, "--output_dir", str(folder), *options])


def start(
    hosts: Hosts, run: Run, *, nodes: str = "2", names: tuple[str, ...] = ("a", "b"), **more: object
) -> list[Job]:
    """Start the run on hosts, one rank each, meeting at the first."""
    return [
        hosts.run(name, SCRIPT, *run.options, NNODES=nodes, NODE_RANK=at, MASTER_ADDR="a", NPROC_PER_NODE=1, **more)
        for at, name in enumerate(names)
    ]
