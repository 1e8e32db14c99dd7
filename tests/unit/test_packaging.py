"""What is built from this checkout holds all that the commands need: the configurations too, and the templates."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ecn_dist

REPOSITORY = Path(__file__).parents[2]
PACKAGE = Path(ecn_dist.__file__).parent
BUILD = "from setuptools.build_meta import *; build_wheel('out'); build_sdist('out')"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive, built by setuptools as pip does."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("checkout")
    for name in ("ecn_dist", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    (source / "out").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, env=environment, capture_output=True, check=True)
    return source / "out"


def wanted() -> set[str]:
    """The package's files, and the configurations as they are in the checkout."""
    files = {path.relative_to(REPOSITORY).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    configs = {f"ecn_dist/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert "ecn_dist/configs/demo.yaml" in configs
    return {name for name in files if "__pycache__" not in name} | configs


def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        assert wanted() <= set(wheel.namelist())
        assert wheel.read("ecn_dist/configs/demo.yaml") == (REPOSITORY / "configs" / "demo.yaml").read_bytes()


def test_the_source_archive_holds_every_file_of_the_package(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert wanted() <= files


def test_the_demo_finds_its_recipe_without_a_checkout(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    code = "from ecn_dist import demo; print(demo.CONFIG); from ecn_dist.config import load; load(demo.CONFIG)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == str(tmp_path / "site" / "ecn_dist" / "configs" / "demo.yaml"), done.stderr
    assert done.returncode == 0, done.stderr
