"""Runs over two hosts, and what becomes of them when a process, a host or a link fails."""

import math
import re
import time
from pathlib import Path

import pytest

from tests.cluster.benches import REPOSITORY, TTL_SECONDS, Hosts, bench
from tests.cluster.runs import START_SECONDS, TIMEOUT_SECONDS, Run, small_run, start
from tests.integration.conftest import Domains

pytestmark = pytest.mark.cluster_hosts

# Beyond the time-out of a collective: for the other ranks' silence to be heard, and for torchrun to end.
END_SECONDS = 60
STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(small_domains: Domains, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happens to, by two hosts; the others must come to the same."""
    folder = tmp_path_factory.mktemp("undisturbed")
    hosts = Hosts(bench("netns-up", "-t", TTL_SECONDS, "a", "b"), folder)
    run = small_run(small_domains, folder / "run")
    try:
        hosts.finish(start(hosts, run), START_SECONDS)
    finally:
        hosts.down()
    return run


def test_two_hosts_train(undisturbed: Run) -> None:
    assert undisturbed.summary["world_size"] == 2
    assert undisturbed.summary["steps"] == STEPS
    assert sorted(undisturbed.losses) == list(range(STEPS))
    assert all(math.isfinite(loss) for loss in undisturbed.losses.values())
    assert {path.name for path in (undisturbed.folder / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}


def test_link_cut_and_healed_goes_unnoticed(
    hosts: Hosts, undisturbed: Run, small_domains: Domains, tmp_path: Path
) -> None:
    run = small_run(small_domains, tmp_path / "run")
    jobs = start(hosts, run)
    run.reaches(7, jobs)
    hosts.link("b", "cut")
    at_cut = len(run.metrics)
    time.sleep(TIMEOUT_SECONDS / 3)
    assert len(run.metrics) <= at_cut + 2  # it does stand still
    hosts.link("b", "heal")
    hosts.finish(jobs, START_SECONDS)
    assert run.losses == undisturbed.losses


def test_link_cut_for_good_ends_both_within_the_timeout(hosts: Hosts, small_domains: Domains, tmp_path: Path) -> None:
    run = small_run(small_domains, tmp_path / "run", epochs=12)
    jobs = start(hosts, run)
    run.reaches(7, jobs)
    hosts.link("b", "cut")
    cut = time.monotonic()
    assert jobs[0].wait(TIMEOUT_SECONDS + END_SECONDS) != 0
    said = jobs[0].text()
    # Who was lost, where, and in which collective; which one depends on the moment.
    assert re.search(r"no heartbeat comes any more from rank 1 on host b, last heard of at \S+ in \w+", said), said
    assert jobs[1].wait(max(TIMEOUT_SECONDS + END_SECONDS - (time.monotonic() - cut), 1.0)) != 0
    assert "the store at a:29500" in jobs[1].text()
    assert "rank 0 on host a, last heard of" in jobs[1].text()


def test_host_without_power_and_the_run_continued(
    hosts: Hosts, undisturbed: Run, small_domains: Domains, tmp_path: Path
) -> None:
    run = small_run(small_domains, tmp_path / "run")
    jobs = start(hosts, run)
    run.reaches(12, jobs)
    hosts.power("b", "off")
    assert jobs[0].wait(TIMEOUT_SECONDS + END_SECONDS) != 0
    assert "rank 1 on host b" in jobs[0].text()
    saved = run.checkpoints[-1]
    assert 10 <= saved < STEPS
    hosts.power("b", "on")
    jobs = start(hosts, run)
    hosts.finish(jobs, START_SECONDS)
    assert f"step {saved}" in jobs[0].text()
    assert run.losses == undisturbed.losses
    assert run.summary["evaluation"] == undisturbed.summary["evaluation"]


def test_process_killed_on_another_host_is_started_again(
    hosts: Hosts, undisturbed: Run, small_domains: Domains, tmp_path: Path
) -> None:
    run = small_run(small_domains, tmp_path / "run")
    jobs = start(hosts, run, MAX_RESTARTS=2)
    run.reaches(12, jobs)
    (worker, *_) = hosts.processes("b", "^[^ ]*python[^ ]* -u -m ecn_dist.train")
    hosts.run("b", "kill", "-KILL", str(worker)).finish(60)
    hosts.finish(jobs, START_SECONDS)
    assert run.losses == undisturbed.losses


def test_lost_host_returns_to_an_elastic_run(hosts: Hosts, small_domains: Domains, tmp_path: Path) -> None:
    # Longer than the test; it is cut off once both hosts train again.
    run = small_run(small_domains, tmp_path / "run", "--memory.momentum", "0.001", epochs=200)
    elastic = {"nodes": "1:2", "MAX_RESTARTS": 9, "RDZV_CONF": "last_call_timeout=2", "RUN_ID": "elastic"}
    jobs = start(hosts, run, **elastic)
    run.reaches(7, jobs)
    hosts.power("b", "off")
    lost_at = run.metrics[-1]["step"]
    log = run.folder / "logs" / "rank-0.log"
    run.reaches(lost_at + 10, jobs[:1])
    assert "1 ranks" in log.read_text()
    hosts.power("b", "on")
    (again,) = start(hosts, run, names=("b",), **elastic)
    jobs = [jobs[0], again]
    alone_at = run.metrics[-1]["step"]
    start_of_two = len(re.findall("2 ranks", log.read_text()))
    while len(re.findall("2 ranks", log.read_text())) == start_of_two:
        run.reaches(alone_at + 1, jobs)
        alone_at = run.metrics[-1]["step"]
    run.reaches(alone_at + 5, jobs)


def test_doctor_finds_a_slow_link(hosts: Hosts, small_domains: Domains, tmp_path: Path) -> None:
    run = small_run(small_domains, tmp_path / "run")
    hosts.link("b", "rate", "40mbit")
    jobs = start(hosts, run, MODULE="ecn_dist.doctor")
    assert jobs[0].wait(START_SECONDS) != 0
    said = jobs[0].text()
    measured = re.search(r"bandwidth (\d+) MB/s", said)
    assert measured, said
    assert 1 <= int(measured.group(1)) <= 5
    assert said.count("WRONG") == 1, said
    assert "below 100 MB/s" in said
    assert str(REPOSITORY) not in said.split("WRONG")[1].split("\n")[0]
