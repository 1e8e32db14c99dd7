"""Real hosts, SLURM and containers on one machine, through the scripts in the folder that ECN_BENCHES names."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHES = os.environ.get("ECN_BENCHES", "")
REPOSITORY = Path(__file__).parents[2]
TTL_SECONDS = 1500  # a bench ends by itself after this, whatever becomes of the tests
COMMANDS = {
    "hosts": ("ip", "nsenter", "unshare", "setpriv"),
    "slurm": ("slurmctld", "slurmd", "sbatch", "munged"),
    "containers": ("podman", "runc", "conmon", "mmdebstrap"),
}


def missing(kind: str) -> str | None:
    """Why benches of this kind cannot be brought up here; None where they can."""
    if not BENCHES:
        return "ECN_BENCHES is not set: the folder with the scripts that bring up hosts (see docs/cluster.md)"
    if os.geteuid() != 0:
        return "bringing up hosts needs root"
    absent = [command for command in COMMANDS[kind] if shutil.which(command) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def bench(script: str, *args: object, timeout: float = 240.0) -> str:
    """Run a bench script to its end; what it printed."""
    command = [str(Path(BENCHES) / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def wait_until(holds: Callable[[], Any], seconds: float, what: str, tell: Callable[[], str] = str) -> Any:
    """Poll until `holds()` is true, and return it; fail after `seconds` with `what` and with what `tell` says."""
    deadline = time.monotonic() + seconds
    while not (result := holds()):
        assert time.monotonic() < deadline, f"{what}: not so after {seconds:g} s\n{tell()}"
        time.sleep(0.1)
    return result


@dataclass
class Job:
    """A command on a host."""

    process: subprocess.Popen[bytes]
    output: Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float) -> int:
        """The exit status; fails where it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s\n{self.text()}") from None

    def finish(self, seconds: float = 120.0) -> None:
        """Wait for a good end."""
        assert self.wait(seconds) == 0, self.text()

    def end(self) -> None:
        """End it, if it still runs."""
        if self.running:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Hosts:
    """Hosts of a bench, each with its own address, name, processes and link."""

    folder: str
    outputs: Path
    jobs: list[Job] = field(default_factory=list)

    def run(self, host: str, *command: object, **environment: object) -> Job:
        """Start a command on a host, in the repository."""
        job_output = self.outputs / f"{len(self.jobs):02d}-{host}.log"
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        variables |= {key: str(value) for key, value in environment.items()}
        with job_output.open("wb") as output:
            process = subprocess.Popen(
                [f"{BENCHES}/netns-exec", self.folder, host, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                cwd=REPOSITORY,
                start_new_session=True,
            )
        self.jobs.append(Job(process, job_output))
        return self.jobs[-1]

    def link(self, host: str, *change: object) -> None:
        bench("netns-link", self.folder, host, *change)

    def power(self, host: str, state: str) -> None:
        bench("netns-power", self.folder, host, state)

    def processes(self, host: str, pattern: str) -> list[int]:
        """The process numbers, on that host, of commands that match."""
        found = self.run(host, "pgrep", "-f", pattern)
        found.wait(60.0)
        return [int(line) for line in found.text().split()]

    def finish(self, jobs: list[Job], seconds: float) -> None:
        """Wait for the good end of all; where one fails, show what each of them said."""
        statuses = [job.process.wait(seconds) for job in jobs]
        assert not any(statuses), "\n".join(f"--- {job.output.name}\n{job.text()}" for job in jobs)

    def down(self) -> None:
        for job in self.jobs:
            job.end()
        bench("netns-down", self.folder)
