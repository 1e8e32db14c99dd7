"""Small synthetic domains and real torchrun runs for the integration tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ecn_dist.pack import main as pack
from ecn_dist.synthesize import main as synthesize

REPOSITORY = Path(__file__).parents[2]
DEMO_CONFIG = REPOSITORY / "configs" / "demo.yaml"
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Domains:
    """Shard folders of a source and a target, and the demo's recipe with a batch of a tenth of their pictures."""

    source: Path
    target: Path
    batch_size: int

    @property
    def options(self) -> list[str]:
        batch = ["--global_batch_size", str(self.batch_size)]
        return ["--config", str(DEMO_CONFIG), "--source", str(self.source), "--target", str(self.target), *batch]


def make_domains(folder: Path, identities: int) -> Domains:
    """Domains of 12 training pictures of each of `identities` people: ten steps an epoch."""
    for domain, styles in (("source", "none"), ("target", "histogram")):
        size = ["--train_identities", str(identities), "--test_identities", "10"]
        assert synthesize(["--domain", domain, "--output", str(folder / "data" / domain), *size]) == 0
        places = ["--input", str(folder / "data" / domain), "--output", str(folder / "shards" / domain)]
        assert pack(["--layout", "market", *places, "--camera_style", styles, "--min_shards", "3"]) == 0
    return Domains(folder / "shards" / "source", folder / "shards" / "target", batch_size=12 * identities // 10)


@pytest.fixture(scope="session")
def small_domains(tmp_path_factory: pytest.TempPathFactory) -> Domains:
    return make_domains(tmp_path_factory.mktemp("domains"), identities=20)


@pytest.fixture(scope="session")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder with query and gallery of other people than the target's, by its cameras."""
    folder = tmp_path_factory.mktemp("validation")
    size = ["--train_identities", "2", "--test_identities", "10", "--test_split", "validation"]
    assert synthesize(["--domain", "target", "--output", str(folder / "data"), *size]) == 0
    places = ["--input", str(folder / "data"), "--output", str(folder / "shards")]
    assert pack(["--layout", "market", *places, "--camera_style", "none"]) == 0
    return folder / "shards"


Torchrun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """`torchrun(2, "-m", "ecn_dist.train", ...)`: a real run on that many ranks of one thread each."""

    def run(world_size: int, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        finished = subprocess.run(
            [*command, *args],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=REPOSITORY,
            check=False,
        )
        if check:
            assert finished.returncode == 0, f"exit {finished.returncode}\n{finished.stdout}\n{finished.stderr}"
        return finished

    return run
