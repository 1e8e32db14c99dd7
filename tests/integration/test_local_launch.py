"""launch/local.sh as it is: doctor between two ranks; and doctor with limits that nothing meets."""

import contextlib
import inspect
import io
import os
import subprocess
import sys
from pathlib import Path

from ecn_dist.doctor import main as doctor
from tests.integration.conftest import REPOSITORY, Domains


def test_doctor_between_ranks(small_domains: Domains, tmp_path: Path) -> None:
    # The cores may be busy with other things, so the limits are low; the next test has ones that nothing meets.
    limits = ["--min_bandwidth", "1", "--max_latency", "5000"]
    environment = {"NPROC_PER_NODE": "2", "MODULE": "ecn_dist.doctor", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    options = [*small_domains.options, "--output_dir", tmp_path / "run", "--device", "cpu", *limits]
    well = subprocess.run(
        [REPOSITORY / "launch" / "local.sh", *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert well.returncode == 0, well.stdout + well.stderr
    for found in ("2 ranks are connected (gloo)", "the same on all ranks", "all ranks see", "MB/s"):
        assert found in well.stdout
    assert "all is well" in well.stdout


def doctor_of_this_rank(argv: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return inspect.unwrap(doctor)(argv), printed.getvalue()


def test_slow_link_is_a_failure_with_a_remedy(ranks, small_domains: Domains, tmp_path: Path) -> None:
    limits = ["--min_bandwidth", "1e9", "--max_latency", "1e-6", "--only", "all_reduce"]
    options = [*small_domains.options, "--output_dir", str(tmp_path / "run"), "--device", "cpu", *limits]
    (status, slow), (other_status, silent) = ranks(2).run(doctor_of_this_rank, options)
    assert status == other_status == 1
    assert slow.count("WRONG") == 1
    assert "GLOO_SOCKET_IFNAME" in slow
    assert not silent
