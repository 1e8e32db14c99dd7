"""launch/slurm.sbatch on a real SLURM: preempted by a partition of higher priority, queued again, finished."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.benches import BENCHES, REPOSITORY, TTL_SECONDS, bench, wait_until
from tests.cluster.runs import START_SECONDS, small_run
from tests.integration.conftest import Domains

pytestmark = pytest.mark.cluster_slurm

Slurm = Callable[..., str]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    """`slurm("squeue", ...)` on a cluster of two nodes with two (make-believe) GPUs each; its standard output."""
    folder = bench("slurm-up", "-n", 2, "-g", 2, "-t", TTL_SECONDS)

    def run(command: str, *args: object) -> str:
        done = subprocess.run(
            [f"{folder}/bin/{command}", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        yield run
    finally:
        subprocess.run([f"{BENCHES}/slurm-down", folder], timeout=60, check=True)


def field(slurm: Slurm, job: str, name: str) -> str:
    match = re.search(rf"\b{name}=(\S+)", slurm("scontrol", "show", "job", job))
    assert match, name
    return match.group(1)


def test_preempted_queued_again_and_finished(slurm: Slurm, small_domains: Domains, tmp_path: Path) -> None:
    # No checkpoint but the one that the signal asks for, so that going on from anywhere else would show.
    run = small_run(small_domains, tmp_path / "run", "--checkpoint.every_steps", "1000")
    log = tmp_path / "job.log"
    resources = ["--partition", "spot", "--nodes", 2, "--gpus-per-node", 1, "--cpus-per-task", 2]
    script = REPOSITORY / "launch" / "slurm.sbatch"
    job = slurm("sbatch", "--parsable", *resources, f"--output={log}", script, *run.options).strip()

    def tell() -> str:
        return slurm("scontrol", "show", "job", job) + (log.read_text() if log.is_file() else "")

    wait_until(lambda: len(run.metrics) >= 7, START_SECONDS, "training", tell)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 2\n")
    above = slurm(
        "sbatch", "--parsable", "--partition", "main", "--nodes", 2, "--exclusive", "--output=/dev/null", urgent
    )
    wait_until(lambda: field(slurm, above.strip(), "JobState") == "COMPLETED", 60, "the urgent job", tell)
    assert field(slurm, job, "Restarts") == "1"
    (saved,) = run.checkpoints
    assert saved >= 7
    assert not (run.folder / "summary.json").exists()

    wait_until(lambda: field(slurm, job, "JobState") == "COMPLETED", START_SECONDS, "the job's end", tell)
    said = log.read_text()
    assert "is asked to end" in said
    assert "start 0: 2 hosts, meeting at node1:" in said
    assert "start 1: 2 hosts, meeting at node1:" in said
    assert re.search(rf"continuing from .*, step {saved}\b", said)
    assert run.summary["world_size"] == 2  # one rank for each GPU
    assert sorted(run.losses) == list(range(30))


def test_failing_job_is_not_queued_again(slurm: Slurm, small_domains: Domains, tmp_path: Path) -> None:
    run = small_run(small_domains, tmp_path / "run", "--global_batch_size", "59")
    log = tmp_path / "job.log"
    script = REPOSITORY / "launch" / "slurm.sbatch"
    job = slurm("sbatch", "--parsable", "--gpus-per-node", 2, f"--output={log}", script, *run.options).strip()
    wait_until(
        lambda: field(slurm, job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"), START_SECONDS, "an end"
    )
    assert field(slurm, job, "JobState") == "FAILED", log.read_text()
    assert field(slurm, job, "Restarts") == "0"
    assert "does not divide by 2 ranks" in log.read_text()
