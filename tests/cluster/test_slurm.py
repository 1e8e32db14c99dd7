"""launch/slurm.sbatch on a real SLURM: preempted by a partition of higher priority, queued again, finished."""

import os
import re
import subprocess
import sys
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
            timeout=120,
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
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

    def trains() -> bool:
        assert field(slurm, job, "JobState") in ("PENDING", "CONFIGURING", "RUNNING"), tell()
        return len(run.metrics) >= 7

    wait_until(trains, START_SECONDS, "training", tell)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 2\n")
    above = slurm(
        "sbatch", "--parsable", "--partition", "main", "--nodes", 2, "--exclusive", "--output=/dev/null", urgent
    )
    wait_until(lambda: field(slurm, above.strip(), "JobState") == "COMPLETED", START_SECONDS, "the urgent job", tell)
    assert field(slurm, job, "Restarts") == "1"
    (saved,) = run.checkpoints
    assert saved >= 7
    assert not (run.folder / "summary.json").exists()

    wait_until(lambda: field(slurm, job, "JobState") == "COMPLETED", START_SECONDS, "the job's end", tell)
    text = log.read_text()
    # Whichever of the two SLURM does first, asking the script or moving the job on.
    assert f"job {job} is asked to end; its ranks save" in text
    assert "start 0: 2 hosts, meeting at node1:" in text
    assert "start 1: 2 hosts, meeting at node1:" in text
    assert re.search(rf"continuing from .*, step {saved}\b", text)
    assert run.summary["world_size"] == 2  # one rank for each GPU
    assert sorted(run.losses) == list(range(30))


@pytest.fixture
def waiting_job(slurm: Slurm, tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """Submit launch/slurm.sbatch with ranks that wait to be asked to end, and take some seconds for it: job and log."""
    interpreter = tmp_path / "python"
    interpreter.write_text(
        "#!/bin/bash\nasked=''\ntrap 'asked=1' USR1 TERM\necho the ranks run\n"
        'while [[ -z "$asked" ]]; do sleep 0.1; done\n'
        "echo the ranks save\nend=$((SECONDS + SAVING_SECONDS))\nwhile ((SECONDS < end)); do sleep 0.1; done\nexit 1\n"
    )
    interpreter.chmod(0o755)
    script = REPOSITORY / "launch" / "slurm.sbatch"

    def submit(name: str, saving_seconds: int, *options: object) -> tuple[str, Path]:
        log = tmp_path / f"{name}.log"
        export = f"--export=ALL,NPROC_PER_NODE=1,PYTHON={interpreter},SAVING_SECONDS={saving_seconds}"
        job = slurm("sbatch", "--parsable", export, f"--output={log}", *options, script).strip()
        return job, log

    return submit


def said(log: Path, text: str, times: int = 1) -> None:
    """Wait until the job has said it so many times."""
    wait_until(
        lambda: log.is_file() and log.read_text().count(text) >= times,
        START_SECONDS,
        f"{times} of {text!r}",
        log.read_text,
    )


def end(slurm: Slurm, job: str) -> tuple[str, str]:
    """Wait until SLURM has nothing more to end of a job that was cancelled: its state and its restarts."""
    wait_until(lambda: field(slurm, job, "JobState") not in ("RUNNING", "COMPLETING"), START_SECONDS, "an end")
    return field(slurm, job, "JobState"), field(slurm, job, "Restarts")


def test_cancelled_job_is_not_queued_again(slurm: Slurm, waiting_job: Callable[..., tuple[str, Path]]) -> None:
    job, log = waiting_job("cancelled", 1)
    said(log, "the ranks run")
    slurm("scancel", job)
    assert end(slurm, job) == ("CANCELLED", "0"), log.read_text()
    assert "is queued again" not in log.read_text()
    assert "is asked to end; its ranks save" in log.read_text()


def test_job_that_is_asked_to_save_is_queued_again_unless_it_is_cancelled_meanwhile(
    slurm: Slurm, waiting_job: Callable[..., tuple[str, Path]]
) -> None:
    job, log = waiting_job("asked", 3)
    said(log, "the ranks run")
    slurm("scancel", "--signal=USR1", "--batch", job)
    said(log, "the ranks run", times=2)
    assert log.read_text().count(f"job {job} is queued again") == 1
    assert field(slurm, job, "Restarts") == "1"
    slurm("scancel", "--signal=USR1", "--batch", job)
    said(log, "is asked to end", times=2)
    said(log, "the ranks save", times=2)
    slurm("scancel", job)
    assert end(slurm, job) == ("CANCELLED", "1"), log.read_text()
    assert log.read_text().count("is queued again") == 1


def test_job_that_comes_to_its_time_limit_is_queued_again(
    slurm: Slurm, waiting_job: Callable[..., tuple[str, Path]]
) -> None:
    # A minute is the shortest limit. One job is asked to end well ahead of it, the other only when it is reached.
    in_time, log = waiting_job("in_time", 1, "--time", 1, "--signal=B:USR1@50")
    too_late, log_of_late = waiting_job("too_late", 1, "--time", 1, "--signal=B:USR1@0")
    said(log, "the ranks run", times=2)
    assert field(slurm, in_time, "Restarts") == "1"
    assert "TIME LIMIT" not in log.read_text()
    slurm("scancel", in_time)
    wait_until(lambda: "the ranks save" in log_of_late.read_text(), 150, "the time limit", log_of_late.read_text)
    said(log_of_late, "the ranks run", times=2)
    assert field(slurm, too_late, "Restarts") == "1"
    assert "TIME LIMIT" in log_of_late.read_text()


def test_failing_job_is_not_queued_again(slurm: Slurm, small_domains: Domains, tmp_path: Path) -> None:
    run = small_run(small_domains, tmp_path / "run", "--global_batch_size", "59")
    log = tmp_path / "job.log"
    (tmp_path / "my project").symlink_to(REPOSITORY)  # the script is found where a folder's name has a space
    script = tmp_path / "my project" / "launch" / "slurm.sbatch"
    job = slurm("sbatch", "--parsable", "--gpus-per-node", 2, f"--output={log}", script, *run.options).strip()
    wait_until(
        lambda: field(slurm, job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"), START_SECONDS, "an end"
    )
    assert field(slurm, job, "JobState") == "FAILED", log.read_text()
    assert field(slurm, job, "Restarts") == "0"
    assert "does not divide by 2 ranks" in log.read_text()
