"""launch/local.sh as it is: doctor between two ranks, well and with limits that nothing meets."""

import os
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import REPOSITORY, Domains


def doctor(domains: Domains, run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {"NPROC_PER_NODE": "2", "MODULE": "ecn_dist.doctor", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [REPOSITORY / "launch" / "local.sh", *domains.options, "--output_dir", run, "--device", "cpu", *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_doctor_between_ranks(small_domains: Domains, tmp_path: Path) -> None:
    # The cores may be busy with other things, so the limits are low; the next test has ones that nothing meets.
    well = doctor(small_domains, tmp_path / "run", "--min_bandwidth", "1", "--max_latency", "5000")
    assert well.returncode == 0, well.stdout + well.stderr
    for found in ("2 ranks are connected (gloo)", "the same on all ranks", "all ranks see", "MB/s"):
        assert found in well.stdout
    assert "all is well" in well.stdout


def test_slow_link_is_a_failure_with_a_remedy(small_domains: Domains, tmp_path: Path) -> None:
    limits = ["--min_bandwidth", "1e9", "--max_latency", "1e-6", "--only", "all_reduce"]
    slow = doctor(small_domains, tmp_path / "run", *limits)
    assert slow.returncode != 0
    assert slow.stdout.count("WRONG") == 1
    assert "GLOO_SOCKET_IFNAME" in slow.stdout
