"""The image of docker/Dockerfile, built on a small Debian in a container store of its own."""

import os
import subprocess
from pathlib import Path

from tests.cluster.benches import REPOSITORY, TTL_SECONDS, bench

BASE = "localhost/local/debian:12"
IMAGE = "localhost/ecn_dist:test"
BUILD_SECONDS = 900


class Store:
    """A container store with nothing but a small Debian."""

    def __init__(self) -> None:
        self.folder = bench("ctr-up", "-t", TTL_SECONDS, timeout=120)
        inside = ["bash", "-c", f". {self.folder}/env && env -0"]
        settings = subprocess.run(inside, capture_output=True, check=True).stdout.decode().split("\0")
        of_store = dict(entry.split("=", 1) for entry in settings if "=" in entry)
        self.env = {key: value for key, value in of_store.items() if os.environ.get(key) != value}

    def podman(self, *args: object, timeout: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["podman", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=REPOSITORY,
            env=os.environ | self.env,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done

    def build(self) -> None:
        """Build the image."""
        command = ["build", "--pull=never", "--layers=false", "--build-arg", f"BASE={BASE}", *_wheels()]
        self.podman(*command, "--file", "docker/Dockerfile", "--tag", IMAGE, ".", timeout=BUILD_SECONDS)

    def down(self) -> None:
        bench("ctr-down", self.folder, timeout=120)


def _wheels() -> list[str]:
    """Where this machine's pip finds wheels in a folder (a CPU build of torch, for one), the build finds them too."""
    folder = os.environ.get("PIP_FIND_LINKS", "")
    if not Path(folder).is_dir():
        return []
    return ["--volume", f"{folder}:/wheels:ro", "--build-arg", "TORCH_ARGS=--find-links /wheels"]
