"""The dry run's figures against the real thing: parameters, checkpoints on disk, bytes handed to collectives."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ecn_dist import train
from ecn_dist.checks import dry_run
from ecn_dist.checks.dry_run import Options, make_plan, measure, meta_method, sent
from ecn_dist.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig
from ecn_dist.errors import UserError
from ecn_dist.methods.base import Step, Transfer
from ecn_dist.methods.options import LossOptions, MemoryOptions
from ecn_dist.training.building import Domains, open_domains
from tests.dataset_folders import pack_folder, write_market

SMALL = Config(
    epochs=4,
    global_batch_size=12,
    data=DataConfig(height=64, width=32, streams=12, workers=0),
    model=ModelConfig(arch="small_resnet", weights="none", embedding_dim=32),
    memory=MemoryOptions(momentum=0.05),
    loss=LossOptions(num_neighbors=6),
    optim=OptimConfig(source_only_epochs=2),
    device="cpu",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("domains")
    for domain, identities, styles in (("source", 8, "none"), ("target", 6, "histogram")):
        pack_folder(
            write_market(folder / f"{domain}-data", identities=identities), folder / domain, camera_style=styles
        )
    places = {key: str(folder / key) for key in ("source", "target")}
    return dataclasses.replace(SMALL, **places, output_dir=str(folder / "run"))


@pytest.fixture(scope="module")
def domains(config: Config) -> Domains:
    return open_domains(config)


def test_steps_and_batches(config: Config) -> None:
    for world_size in (1, 2, 3, 4):
        plan = make_plan(config, world_size)
        assert plan.timeline.steps_per_epoch == 48 // 12
        assert plan.timeline.total_steps == (2 + 4) * (48 // 12)
        assert plan.batch_per_rank * world_size == 12
        assert plan.num_exemplars == 36


def test_validation_data_that_cannot_choose(config: Config) -> None:
    saving = CheckpointConfig(keep_best=True, validation=config.target)
    with pytest.raises(UserError, match="the test's people choose nothing"):
        make_plan(dataclasses.replace(config, checkpoint=saving), 1)


def test_memory_falls_with_the_ranks_but_for_what_every_rank_holds(config: Config) -> None:
    one, four = make_plan(config, 1).memory, make_plan(config, 4).memory
    for whole in ("parameters", "gradients", "optimizer"):
        assert one[whole] == four[whole]
    for divided in ("memory rows", "activations", "pictures"):
        assert one[divided] == pytest.approx(4 * four[divided], rel=0.01)
    assert one["memory rows"] == 36 * (32 * 4 + 8)


def test_nothing_is_sent_on_one_rank(config: Config) -> None:
    assert make_plan(config, 1).sent_bytes == 0


@pytest.mark.parametrize(
    ("operation", "payload", "expected"),
    [
        ("all_reduce", 300, 400),  # 2 (W - 1) / W
        ("all_gather", 100, 200),  # W - 1 parts of the others pass through
        ("reduce_scatter", 300, 200),  # (W - 1) / W
        ("all_to_all", 300, 200),
    ],
)
def test_what_a_ring_of_three_sends(operation: str, payload: int, expected: int) -> None:
    assert sent(Transfer("", operation, payload), 3) == expected


def test_network_is_counted_as_it_is(config: Config, domains: Domains) -> None:
    network = meta_method(config, domains)
    cost = measure(config, domains, 1)
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    assert all(p.device.type == "meta" for p in network.parameters())
    assert cost.trained_parameters == cost.parameters
    frozen = dataclasses.replace(config, model=dataclasses.replace(config.model, weights="x", frozen_stages=2))
    assert measure(frozen, domains, 1).trained_parameters < cost.parameters
    assert measure(frozen, domains, 1).activations < cost.activations
    assert measure(frozen, domains, 1).flops < cost.flops


def test_activations_are_those_that_a_real_step_keeps(config: Config, domains: Domains) -> None:
    """By the bytes that stay allocated between forward and backward, on the CPU, where autograd alone holds them."""
    cost = measure(config, domains, 2)
    network = meta_method(config, domains).to_empty(device="cpu")
    for tensor in [*network.parameters(), *network.buffers()]:
        torch.nn.init.zeros_(tensor)
    held: dict[int, torch.UntypedStorage] = {}
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    images = torch.zeros(2, 6, 3, 64, 32)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        network({"source": images[0], "target": images[1]}, Step(0, 0, False))
    real = sum(storage.nbytes() for storage in held.values())
    masks = 2 * 6 * 32 * 4
    assert cost.activations * 4 - masks == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "world_size", "said"),
    [
        ({}, 5, "does not divide by 5 ranks"),
        ({"global_batch_size": 60}, 2, "60"),  # more than the source has
        ({"loss": LossOptions(num_neighbors=37)}, 2, "only 36 training pictures"),
        ({"model": dataclasses.replace(SMALL.model, batchnorm="local")}, 12, "at least 2 pictures"),
        (
            {"global_batch_size": 1, "data": dataclasses.replace(SMALL.data, streams=1)},
            1,
            "sync statistics need at least 2",
        ),
        ({"model": dataclasses.replace(SMALL.model, arch="resnet5")}, 1, "did you mean"),
        ({"model": dataclasses.replace(SMALL.model, frozen_stages=9, weights="x")}, 1, "has 5 stages"),
        ({"source": "/nowhere"}, 1, "no such shard folder"),
    ],
)
def test_impossible_plans_are_refused(config: Config, changes: dict, world_size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_plan(dataclasses.replace(config, **changes), world_size)


def test_plans_that_do_not_fit_are_refused(config: Config) -> None:
    plan = make_plan(config, 2)
    enough = plan.memory_bytes / dry_run.GIB * 1.01
    dry_run.check_fits(plan, config, Options(2, gib_per_rank=enough))
    with pytest.raises(UserError, match="the largest part is"):
        dry_run.check_fits(plan, config, Options(2, gib_per_rank=enough / 2))
    with pytest.raises(UserError, match=r"lower checkpoint\.keep"):
        dry_run.check_fits(dataclasses.replace(plan, checkpoints=10**12), config, Options(2))


def test_time_is_that_of_the_given_speed_and_no_other(config: Config) -> None:
    plan = make_plan(config, 2)
    images = 2 * 4 * 12 + 4 * 4 * 24  # source-only steps have one domain
    assert f"time        0:00:{images // 24} at 24 images/s" in dry_run.describe(plan, config, Options(2, 24.0))
    assert "time" not in dry_run.describe(plan, config, Options(2))


def options_of(config: Config) -> list[str]:
    flat = {"source": config.source, "target": config.target, "output_dir": config.output_dir, "device": "cpu"}
    flat |= {"epochs": 1, "global_batch_size": 12, "data.height": 64, "data.width": 32, "data.streams": 12}
    flat |= {"data.workers": 0, "model.arch": "small_resnet", "model.weights": "none", "model.embedding_dim": 32}
    flat |= {"logging.tensorboard": "false"}
    return [part for key, value in flat.items() for part in (f"--{key}", str(value))]


def test_command_prints_the_plan_and_starts_nothing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*options_of(config), "--dry_run", "--world_size", "3", "--images_per_second", "100"]) == 0
    said = capsys.readouterr().out
    for word in ("ranks       3", "4 an epoch", "4 images of each domain on a rank", "checkpoint", "100 images/s"):
        assert word in said
    assert not Path(config.output_dir).exists()
    assert train.main([*options_of(config), "--dry_run", "--world_size", "7"]) == 2
    assert "does not divide" in capsys.readouterr().err
    assert train.main([*options_of(config), "--world_size", "3"]) == 2
    assert "belongs to --dry_run" in capsys.readouterr().err
    for option in (
        "--images_per_second=nan",
        "--images_per_second=1e-300",
        "--images_per_second=inf",
        "--gib_per_rank=nan",
        "--world_size=0",
    ):
        assert train.main([*options_of(config), "--dry_run", option]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert option.partition("=")[0].lstrip("-") in shown


def test_a_run_folder_that_cannot_be(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        assert train.main([*options_of(config), "--output_dir", str(tmp_path / place), "--dry_run"]) == 2
        assert f"{tmp_path / 'file'} is a file; name a folder" in capsys.readouterr().err


def test_ranks_are_those_of_torchrun(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train.main([*options_of(config), "--dry_run"]) == 0
    assert "ranks       4" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert train.main([*options_of(config), "--dry_run"]) == 2
    assert "WORLD_SIZE is 'many'" in capsys.readouterr().err


def test_help_of_train_has_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for option in ("--dry_run", "--world_size", "--images_per_second", "--gib_per_rank", "--memory.momentum"):
        assert option in said


def test_checkpoint_size_is_that_on_disk(config: Config) -> None:
    options = options_of(config)
    assert train.main(options) == 0
    (checkpoint,) = [p for p in (Path(config.output_dir) / "checkpoints").iterdir() if p.name.startswith("step-")]
    on_disk = sum(file.stat().st_size for file in checkpoint.iterdir() if file.suffix == ".safetensors")
    # Headers of the files come on top.
    assert on_disk == pytest.approx(make_plan(config, 1).checkpoint_bytes, rel=0.02)


def test_clusters_with_proxies_and_gem_are_planned(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*options_of(config), "--method", "cluster", "--dry_run", "--images_per_second", "6", "--epochs", "2"]
    options += ["--cluster.camera_weight", "0.5", "--cluster.instances", "2", "--cluster.steps_per_epoch", "5"]
    options += ["--model.pooling", "gem", "--optim.optimizer", "adam"]
    assert train.main(options) == 0
    assert "0:00:20 at 6 images/s" in capsys.readouterr().out  # 10 steps of 12 pictures
