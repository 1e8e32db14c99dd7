"""The program in the README does what it says."""

import re
import shutil
from pathlib import Path

import pytest

from ecn_dist.reporting.run_reader import read_run
from tests.integration.conftest import REPOSITORY, Domains


@pytest.mark.timeout(300)
def test_ten_lines_of_python_train(small_domains: Domains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert code is not None
    lines = code.group(1).replace("--epochs 1", "--epochs 1 --optim.source_only_epochs 1")
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (tmp_path / "shards").mkdir()
    for name in ("source", "target"):
        (tmp_path / "shards" / name).symlink_to(getattr(small_domains, name))
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "README.md", "exec"), {})
    run = read_run(tmp_path / "runs" / "python")
    assert run.evaluation["mAP"] > 0
    assert (run.path / "report.html").is_file()
