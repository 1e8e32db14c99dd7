"""Packing needs no torch: it runs where pictures are, which need not be where training is."""

import ast
from pathlib import Path

import ecn_dist

PACKAGE = Path(ecn_dist.__file__).parent


def imports_of(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_module_that_packing_or_drawing_reaches_imports_torch() -> None:
    waiting = [*(PACKAGE / "packing").glob("*.py"), *(PACKAGE / "synthetic").glob("*.py")]
    reached: set[Path] = set()
    while waiting:
        file = waiting.pop()
        reached.add(file)
        imports = imports_of(file)
        assert not {name for name in imports if name.partition(".")[0] in ("torch", "torchvision")}, file
        ours = {PACKAGE / (name.partition(".")[2].replace(".", "/") + ".py") for name in imports if "ecn_dist." in name}
        waiting += [path for path in ours - reached if path.is_file()]
    assert PACKAGE / "data" / "index.py" in reached
