"""Print what the library needs at run time: the dependencies of pyproject.toml, with those of the extras named."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [name for extra in sys.argv[1:] for name in project["optional-dependencies"][extra]]
print("\n".join([*project["dependencies"], *extras]))
