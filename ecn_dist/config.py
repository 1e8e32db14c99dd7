"""Every option of a run: dataclasses, filled from a YAML file and the command line. Imports nothing of ours but errors.

A YAML key `memory.momentum` is the option `--memory.momentum`; later ones override earlier ones. Unknown keys fail.
"""

import dataclasses
import difflib
import math
import re
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from ecn_dist.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


_ABOVE_0 = (
    "global_batch_size",
    "data.streams",
    "data.height",
    "data.width",
    "model.embedding_dim",
    "memory.temperature",
    "optim.lr",
    "optim.backbone_lr",
    "evaluation.batch_size",
    "logging.every_steps",
    "checkpoint.keep",
    "timeout_seconds",
)
_AT_LEAST_0 = (
    "seed",
    "data.workers",
    "data.max_bad_samples",
    "model.frozen_stages",
    "loss.num_neighbors",
    "optim.weight_decay",
    "optim.warmup_epochs",
    "optim.step_epoch",
    "optim.source_only_epochs",
    "memory.momentum",
    "checkpoint.every_steps",
    "evaluation.every_epochs",
)
_BELOW_1 = ("loss.target_weight", "model.dropout", "optim.momentum")


@dataclass(frozen=True)
class DataConfig:
    height: int = 256
    """height of the network's input in pixels"""
    width: int = 128
    """width of the network's input in pixels"""
    camera_style: bool = True
    """camera-invariance: a target picture appears in the style of a random camera (METHOD.md, w'C')"""
    random_erasing: float = 0.5
    """probability of random erasing, both domains"""
    streams: int = 16
    """logical streams S a pass is cut into: a divisor of global_batch_size and a multiple of the ranks"""
    workers: int = 2
    """loader processes a rank and domain; 0 reads in the training process"""
    max_bad_samples: int = 0
    """pictures that cannot be decoded and are replaced, a pass and rank; one more ends the run"""


@dataclass(frozen=True)
class ModelConfig:
    arch: str = "resnet50"
    """small_resnet, or any torchvision classification network with a pooled feature"""
    weights: str = "imagenet"
    """imagenet (from torch's cache), none, a file of state-dict tensors, or a URL of one"""
    embedding_dim: int = 4096
    """length D of the embedding, and of a memory row"""
    dropout: float = 0.5
    """of the source head and of the target feature"""
    frozen_stages: int = 0
    """stages from the input on that are not trained (ResNets: 3 = stem, layer1, layer2)"""
    shortcut_batchnorm_trains: bool = False
    """leave the shortcut BatchNorms of frozen stages in training mode, as the published code does"""
    batchnorm: Literal["sync", "local"] = "sync"
    """statistics over the global batch, as one process has, or over each rank's part"""


@dataclass(frozen=True)
class MemoryConfig:
    temperature: float = 0.05
    """beta of the softmax over exemplars"""
    momentum: float = 0.01
    """m of an update is this times the epoch"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of the rows; auto: fp32 (fp64 where precision is fp64)"""
    backend: Literal["torch", "triton"] = "torch"
    """of the pass over the rows; triton: kernels for bf16 or fp16 rows on CUDA, D a multiple of 64"""
    start: Literal["zeros", "weights"] = "zeros"
    """the rows at first; weights: those of the published code's checkpoint that model.weights names"""


@dataclass(frozen=True)
class LossConfig:
    target_weight: float = 0.3
    """lambda of L = (1 - lambda) L_source + lambda L_target; 0 is the control without target loss"""
    num_neighbors: int = 6
    """k of neighbourhood-invariance; 0 turns it off"""
    neighbors_from_epoch: int = 5
    """first epoch with neighbourhood-invariance"""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 0.1
    """learning rate of the new layers (embedding, source head)"""
    backbone_lr: float = 0.01
    """learning rate of the backbone"""
    momentum: float = 0.9
    """of SGD, with Nesterov's correction"""
    weight_decay: float = 5e-4
    """on every trained parameter"""
    schedule: Literal["step", "cosine"] = "step"
    """step: x0.1 at step_epoch; cosine: to 0 over the epochs"""
    step_epoch: int = 40
    """epoch at which the step schedule divides by 10"""
    warmup_epochs: float = 0.0
    """epochs of linear warm-up from 0"""
    source_only_epochs: int = 0
    """epochs on the source alone before epoch 0; for networks that start at random"""


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 0
    """steps between checkpoints; 0: at the end of every epoch"""
    keep: int = 2
    """newest checkpoints that are kept"""
    keep_best: bool = False
    """also keep the one of the highest mAP among the evaluations during training (evaluation.every_epochs)"""
    keep_epochs: list[int] = field(default_factory=list)
    """also keep those of the ends of these epochs, as [10, 40]"""
    asynchronous: bool = False
    """write in the background; costs host memory of the size of this rank's part"""
    on_failure: Literal["stop", "continue"] = "stop"
    """whether a save that fails (a full disk) ends the run"""


@dataclass(frozen=True)
class EvaluationConfig:
    every_epochs: int = 0
    """epochs between evaluations during training; 0: only at the end"""
    batch_size: int = 128
    """pictures a rank embeds at once"""


@dataclass(frozen=True)
class DeepSpeedConfig:
    zero_stage: Literal[0, 1, 2] = 1
    """with engine deepspeed: divide among the ranks nothing (0), the optimiser's state (1), gradients too (2)"""


@dataclass(frozen=True)
class LoggingConfig:
    every_steps: int = 10
    """steps between lines of metrics.jsonl; every line costs one small all-reduce"""
    tensorboard: bool = True
    """write tensorboard/"""
    figures: bool = True
    """at the end draw figures/ and write report.html"""


@dataclass(frozen=True)
class Config:
    source: str = ""
    """shard folder of the labelled source domain"""
    target: str = ""
    """shard folder of the target domain; its identities never reach a loss"""
    output_dir: str = ""
    """the run folder"""
    seed: int = 0
    """of every random choice"""
    epochs: int = 60
    """passes over the source images with both losses; 0 is allowed after source-only epochs"""
    global_batch_size: int = 128
    """images of each domain in one step, over all ranks"""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16 and fp16 by autocast (fp16 with loss scaling); fp64 is for tests"""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    """what carries the gradients between ranks"""
    device: str = "auto"
    """auto (the accelerator, else the CPU), cpu, cuda, ..."""
    timeout_seconds: float = 300.0
    """a collective that waits longer fails"""
    resume: str = "auto"
    """auto (from the newest complete checkpoint of output_dir, if any), never, or the path of a checkpoint or run"""
    resume_changed: Literal["refuse", "allow"] = "refuse"
    """whether a run may continue with options or data that change its results"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def check(self) -> None:
        """Raise `UserError` for values that no run can have, without touching a file."""
        for key in ("source", "target", "output_dir"):
            if not getattr(self, key):
                raise UserError(f"{key}: is not set; give it in the --config file or as --{key}")
        # Written so that NaN passes none of them.
        options = flatten(self)
        for key in _ABOVE_0:
            if not options[key] > 0:
                raise UserError(f"{key}: {options[key]} must be above 0")
        for key in _AT_LEAST_0:
            if not 0 <= options[key] < math.inf:
                raise UserError(f"{key}: {options[key]} must be at least 0")
        for key in _BELOW_1:
            if not 0.0 <= options[key] < 1.0:
                raise UserError(f"{key}: {options[key]} must be at least 0 and below 1")
        if not 0.0 <= self.data.random_erasing <= 1.0:
            raise UserError(f"data.random_erasing: {self.data.random_erasing} must be from 0 to 1")
        if self.epochs < 0 or self.epochs + self.optim.source_only_epochs < 1:
            raise UserError(f"epochs: {self.epochs} must be above 0, or 0 after source-only epochs")
        last_momentum = self.memory.momentum * (self.epochs - 1)
        if last_momentum >= 1:
            raise UserError(
                f"memory.momentum: {self.memory.momentum} times the last epoch ({self.epochs - 1}) is "
                f"{last_momentum:g}, and the rows' momentum must stay below 1; lower memory.momentum or epochs"
            )
        if self.model.weights == "none" and self.model.frozen_stages:
            raise UserError(
                f"model.frozen_stages: {self.model.frozen_stages} stages would stay random, as model.weights is none; "
                "set it to 0, or give weights"
            )

    def check_ranks(self, world_size: int) -> None:
        """Raise `UserError` where the global batch cannot be cut for `world_size` ranks."""
        batch, streams = self.global_batch_size, self.data.streams
        if batch % world_size:
            near = max(1, round(batch / world_size)) * world_size
            raise UserError(
                f"global_batch_size: {batch} does not divide by {world_size} ranks; {near} would, "
                f"or use {_divisors(batch)} ranks",
                on_all_ranks=True,
            )
        if streams % world_size or batch % streams:
            fitting = [s for s in range(world_size, batch + 1, world_size) if batch % s == 0]
            raise UserError(
                f"data.streams: {streams} must divide global_batch_size ({batch}) and be a multiple of the ranks "
                f"({world_size}); these would do: {', '.join(map(str, fitting))}",
                on_all_ranks=True,
            )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def parse(argv: list[str] | None, prog: str, description: str) -> Config:
    """The configuration that YAML files (`--config`) and options give.

    Raises `UserError`: for an unknown key with the nearest known one, for a value of the wrong type with the key.
    """
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options; may be given more than once")
    parser.add_class_arguments(Config, None)
    try:
        namespace = parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        raise UserError(_with_nearest_key(str(error))) from error
    return Config(**{f.name: namespace[f.name] for f in dataclasses.fields(Config)})


def load(path: Path) -> Config:
    """The configuration stored in a run folder's config.yaml."""
    if not path.is_file():
        raise UserError(f"there is no {path}; name a run folder that `train` wrote, or a checkpoint inside one")
    return parse(["--config", str(path)], prog="ecn_dist", description="")


def dump(config: Config) -> str:
    """YAML of the whole resolved configuration; `load` reads it back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def flatten(config: Config) -> dict[str, Any]:
    """{"memory.momentum": 0.01, ...}: every option by its dotted key."""
    flat: dict[str, Any] = {}
    for key, value in dataclasses.asdict(config).items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _with_nearest_key(message: str) -> str:
    """Name the nearest known key where the parser's message speaks of an unknown one."""
    known = list(flatten(Config()))
    patterns = (
        r"unrecognized arguments: --(\S+?)(?:=|\s|$)",
        r"[Gg]roup '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'",
        r"[Oo]ption '([\w.]+)' is not accepted",
    )
    for pattern in patterns:
        if match := re.search(pattern, message):
            groups = match.groupdict()
            key = f"{groups['group']}.{groups['name']}" if groups else match.group(1)
            by_last = {name.rsplit(".", 1)[-1]: name for name in known}
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
                by_last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_last), n=1)
            ]
            hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"
            return f"unknown option {key!r}{hint}"
    return message
