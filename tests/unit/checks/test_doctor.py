"""doctor on one host: what is well is found well, and each thing that is broken here is named with a remedy."""

import dataclasses
import shutil
import socket
from pathlib import Path

import pytest

from ecn_dist import doctor
from ecn_dist.checks import host_checks
from ecn_dist.checks.group_checks import MOST_CLOCK_SECONDS, judge_clocks
from ecn_dist.checks.host_checks import Finding, guarded
from ecn_dist.config import Config, DataConfig
from ecn_dist.errors import UserError
from tests.dataset_folders import pack_folder, write_market

CPU = Config(device="cpu")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    pack_folder(write_market(root / "data"), root / "shards", camera_style="histogram")
    return root / "shards"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def only(findings: object) -> Finding:
    (finding,) = findings  # type: ignore[misc]
    return finding


def test_all_is_well(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--source", str(sound), "--target", str(sound), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    options += ["--global_batch_size", "12", "--data.streams", "12", "--data.height", "64", "--data.width", "32"]
    assert doctor.main([*options, "--model.arch", "small_resnet"]) == 0
    said = capsys.readouterr().out
    assert "all is well" in said
    assert "WRONG" not in said
    assert not (tmp_path / "run").exists()


def test_a_lost_shard_and_an_impossible_plan(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = Path(shutil.copytree(sound, tmp_path / "shards"))
    (shards / "query-000000.tar").unlink()
    options = [
        "--source",
        str(sound),
        "--target",
        str(shards),
        "--output_dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    assert doctor.main([*options, "--global_batch_size", "13", "--quiet"]) == 1
    said = capsys.readouterr().out
    assert "query-000000.tar is missing" in said
    assert "data.streams" in said
    assert said.count("WRONG") == said.count("remedy") == 2
    assert doctor.main([*options, "--global_batch_size", "13", "--quiet", "--only", "torch"]) == 0


def test_cut_shard_and_damaged_picture(sound: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(sound, tmp_path / "cut"))
    with (cut / "train-000000.tar").open("r+b") as file:
        file.truncate(2048)
    findings = list(host_checks.check_shards(dataclasses.replace(CPU, source=str(cut), target=str(sound))))
    assert not findings[0].ok
    assert "has 2048 bytes" in findings[0].text
    assert findings[1].ok
    damaged = Path(shutil.copytree(sound, tmp_path / "damaged"))
    size = (damaged / "train-000000.tar").stat().st_size
    (damaged / "train-000000.tar").write_bytes(bytes(size))
    assert "cannot be read" in next(iter(host_checks.check_shards(dataclasses.replace(CPU, source=str(damaged))))).text


def test_too_little_shared_memory() -> None:
    needs = dataclasses.replace(CPU, global_batch_size=10**9, data=DataConfig(workers=4))
    finding = only(host_checks.check_shm(needs))
    assert "--shm-size" in finding.remedy
    # Two batches ahead of each worker and one in use, of each domain, on the one rank.
    assert host_checks.needed_shared_memory(needs) == 2 * (4 * 2 + 1) * 10**9 * 256 * 128 * 3
    assert only(host_checks.check_shm(dataclasses.replace(CPU, data=DataConfig(workers=0)))).ok


def test_rendezvous_name_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert "all hosts know" in only(host_checks.check_rendezvous()).remedy


def test_rendezvous_port_that_is_taken_and_one_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        assert "choose another MASTER_PORT" in only(host_checks.check_rendezvous()).remedy
        monkeypatch.setenv("RANK", "0")  # in a run, the launcher is who answers
        assert only(host_checks.check_rendezvous()).ok
    assert "launcher on that host has ended" in only(host_checks.check_rendezvous()).remedy
    monkeypatch.delenv("RANK")
    assert only(host_checks.check_rendezvous()).ok


def test_rendezvous_name_that_is_every_hosts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "every host's own address" in only(host_checks.check_rendezvous()).text


def network_of(monkeypatch: pytest.MonkeyPatch, *devices: str, address: str = "10.0.0.5", hosts: int = 1) -> None:
    """This host has these network devices, its name leads to `address`, and it is one of `hosts`."""
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(devices, 1)))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    monkeypatch.setenv("WORLD_SIZE", str(hosts))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


def test_network_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-device")
    finding = only(host_checks.check_host())
    assert "no-such-device" in finding.text
    assert "lo" in finding.remedy


@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),  # whole names
        ("GLOO_SOCKET_IFNAME", "eth0,ib1", False),  # gloo opens every one
        ("GLOO_SOCKET_IFNAME", "slow0", False),  # "lo" is a part of it
        ("GLOO_SOCKET_IFNAME", "lo", False),  # there, and leads to no other host
        ("NCCL_SOCKET_IFNAME", "e", True),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "wlan,ib", True),  # one that fits is enough
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "=eth0:17,ib0", True),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", True),
        ("NCCL_SOCKET_IFNAME", "^=lo", True),
        ("NCCL_SOCKET_IFNAME", "eth01", False),
        ("NCCL_SOCKET_IFNAME", "slow0", False),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", False),  # nothing is left
        ("NCCL_SOCKET_IFNAME", "^docker", False),  # lo is left, and comes first
    ],
)
def test_variables_that_name_network_devices(
    variable: str, value: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network_of(monkeypatch, "lo", "eth0", "ib0", hosts=2)
    monkeypatch.setenv(variable, value)
    finding = only(host_checks.check_host())
    assert finding.ok == right, finding
    if not right:
        other = {"GLOO_SOCKET_IFNAME": "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME": "GLOO_SOCKET_IFNAME"}[variable]
        assert f"{variable}={value}" in finding.text
        assert f"set {variable} to" in finding.remedy
        assert "has: eth0, ib0" in finding.remedy
        assert other not in finding.text + finding.remedy


def test_both_variables_that_name_network_devices_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    network_of(monkeypatch, "lo", "eth0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    gloo, nccl = host_checks.check_host()
    assert "GLOO_SOCKET_IFNAME=eth9" in gloo.text
    assert "NCCL_SOCKET_IFNAME=ib" in nccl.text


def test_loopback_is_well_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    network_of(monkeypatch, "lo", address="127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert only(host_checks.check_host()).ok


def test_own_name_that_leads_to_loopback_is_mended_by_the_device_of_gloo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network_of(monkeypatch, "lo", "eth0", address="127.0.1.1", hosts=2)
    assert "/etc/hosts" in only(host_checks.check_host()).remedy
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    assert "/etc/hosts" in only(host_checks.check_host()).remedy
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert only(host_checks.check_host()).ok


def test_output_folder_that_cannot_be_written() -> None:
    finding = only(host_checks.check_disk(dataclasses.replace(CPU, output_dir="/proc/self/runs"), None))
    assert not finding.ok


def test_disk_that_is_too_small(tmp_path: Path) -> None:
    config = dataclasses.replace(CPU, output_dir=str(tmp_path / "a" / "b"))
    assert only(host_checks.check_disk(config, 1)).ok
    assert "lower checkpoint.keep" in only(host_checks.check_disk(config, 2**60)).remedy


def test_accelerator_asked_for_and_not_there() -> None:
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this host has an accelerator")
    finding = only(host_checks.check_accelerator(dataclasses.replace(CPU, device="cuda")))
    assert "--gpus all" in finding.remedy


def test_clocks() -> None:
    assert judge_clocks([0.0, 0.003, -0.002]).ok
    late = judge_clocks([0.0, 0.001, -MOST_CLOCK_SECONDS - 1])
    assert "rank 2" in late.text
    assert "NTP" in late.remedy


def test_unexpected_errors_become_findings() -> None:
    def fails() -> list[Finding]:
        raise UserError("the disk is on fire")

    assert "on fire" in only(guarded("disk", fails)).text


def test_help_and_unknown_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--only", "horoscope"]) == 2
    assert "no check horoscope" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--min_bandwidth" in said
    assert "--memory.momentum" in said
