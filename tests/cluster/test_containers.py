"""The image of docker/Dockerfile on a local base, and docker/compose.yaml's two nodes as containers on two hosts."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.benches import REPOSITORY, TTL_SECONDS, Hosts, bench, wait_until
from tests.cluster.images import IMAGE, Store
from tests.cluster.runs import START_SECONDS, small_run
from tests.integration.conftest import Domains

pytestmark = [pytest.mark.cluster_containers, pytest.mark.timeout(1000)]


def once(store: Store, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A container from start to end."""
    return store.podman("run", "--rm", *options, IMAGE, *command, check=False)


def test_image_runs_without_root_and_holds_no_data(image: Store) -> None:
    assert once(image, "id", "-u", options=("--env", "ECN_CHECKS=")).stdout.strip() == "10001"
    found = once(image, "find", "/opt/ecn", "-type", "f", options=("--env", "ECN_CHECKS=")).stdout.split()
    assert {Path(file).relative_to("/opt/ecn").parts[0] for file in found} == {"configs", "launch", "entrypoint.sh"}
    recipe = "from ecn_dist import demo; print(demo.CONFIG.is_file())"
    assert once(image, "python", "-c", recipe, options=("--env", "ECN_CHECKS=")).stdout.strip() == "True"
    assert once(image, "touch", "runs/mine", options=("--env", "ECN_CHECKS=")).returncode == 0
    # What the build needed stays in its own stage: sources, wheels, caches.
    as_root = ("--env", "ECN_CHECKS=", "--user", "root")
    left = once(image, "find", "/src", "/wheels", "/root", "/var/cache/apt", "-size", "+9k", options=as_root)
    assert left.stdout == ""


def test_container_with_too_little_shared_memory_says_so(image: Store) -> None:
    started = once(image, "ecn-dist", "--help", options=("--shm-size=1m",))
    assert started.returncode == 2
    assert "--shm-size=8g" in started.stdout
    assert "ECN_CHECKS=" in started.stderr
    assert once(image, "ecn-dist", "--help", options=("--shm-size=1g",)).returncode == 0


def composed(name: str, environment: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """A service of compose.yaml, its variables filled in, and the options of `podman run` that mean the same."""
    text = (REPOSITORY / "docker/compose.yaml").read_text()
    for variable, value in environment.items():
        text = _fill(text, variable, value)
    service = yaml.safe_load(text)["services"][name]
    options = [f"--name={name}", f"--user={service['user']}", f"--shm-size={service['shm_size']}"]
    options += [f"--volume={volume}" for volume in service["volumes"]]
    options += [f"--env={key}={value}" for key, value in service["environment"].items()]
    return service, options


def _fill(text: str, variable: str, value: str) -> str:
    """`${NAME}`, `${NAME:-default}` and `${NAME:?message}` of `variable` become `value`."""
    head, *rest = text.split(f"${{{variable}")
    return head + "".join(value + part.split("}", 1)[1] for part in rest)


def test_two_containers_on_two_hosts_train(image: Store, small_domains: Domains, tmp_path: Path) -> None:
    """The hosts come up after the store, or they would not see it."""
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o777)
    shards = Path(os.path.commonpath([small_domains.source, small_domains.target]))
    for folder in (*tmp_path.parents[:2], *shards.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)  # pytest's folders are for root alone, and the image's user is not
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    filled = {"SHARDS": str(shards), "RUNS": str(runs), "ECN_IMAGE": IMAGE, "ECN_USER": "10001:10001"}
    filled |= {"SHM_SIZE": "256m", "NPROC_PER_NODE": "1"}
    run = small_run(small_domains, runs / "demo", epochs=1)
    hosts = Hosts(bench("netns-up", "-t", TTL_SECONDS, "node0", "node1"), outputs)
    try:
        jobs = []
        for name in ("node0", "node1"):
            service, options = composed(name, filled)
            assert service["image"] == IMAGE
            more = ["--epochs=1", "--optim.source_only_epochs=0", "--device=cpu", "--timeout_seconds=60"]
            command = [*service["command"], *more, "--logging.tensorboard=false", "--logging.figures=false"]
            jobs.append(
                hosts.run(
                    name, "podman", "run", "--rm", "--env=OMP_NUM_THREADS=1", *options, IMAGE, *command, **image.env
                )
            )
        hosts.finish(jobs, START_SECONDS)
    finally:
        hosts.down()
    wait_until(lambda: not image.podman("ps", "--quiet").stdout, 60, "no container is left")
    assert run.summary["world_size"] == 2
    assert run.summary["steps"] == 10
    assert (run.folder / "weights.safetensors").stat().st_uid == 10001
