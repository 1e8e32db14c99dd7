"""The layout's rules: imports go down only, one home of torch.distributed, files that can be read in one sitting."""

import ast
from pathlib import Path

import pytest

import ecn_dist

PACKAGE = Path(ecn_dist.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ANYWHERE = {"config_gate", "errors", "files", "processes", "torchvision_compat"}
# From the top down; the packages of one line do not import each other, and the mains stand above all.
FLOORS = (
    ("styles", "checks", "serving"),
    ("training",),
    ("reporting", "packing", "synthetic"),
    ("methods",),
    ("clustering",),
    ("ranking",),
    ("memory", "data", "models"),
    ("distributed",),
)
MAY_IMPORT = {
    name: {below for floor in FLOORS[at + 1 :] for below in floor} for at, floor in enumerate(FLOORS) for name in floor
}
for name in (*FLOORS[0], *FLOORS[1]):
    MAY_IMPORT[name] |= {"config"}
MAY_IMPORT["config"] = {"methods"}
MAY_IMPORT["config_gate"] = set()


def imported_modules(file: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def part_of(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    part = part_of(file)
    if part not in MAY_IMPORT:
        return  # the mains stand above everything
    parts = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    ours = {module.split(".")[1] for module in imported_modules(file) if module.startswith("ecn_dist.")} & parts
    assert ours <= MAY_IMPORT[part] | ANYWHERE | {part}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_distributed_knows_torch_distributed(file: Path) -> None:
    if part_of(file) != "distributed":
        assert not any(module.startswith("torch.distributed") for module in imported_modules(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_can_be_read_in_one_sitting(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 350
