"""Every option of a run: dataclasses, filled from a YAML file and the command line.

A YAML key `memory.momentum` is the option `--memory.momentum`; later ones override earlier ones. Unknown keys fail.
The sections of methods are dataclasses of their own folders. Imports nothing of ours but their table and the gate.
"""

import dataclasses
import difflib
import re
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from ecn_dist import methods
from ecn_dist.config_gate import check_yaml, flat
from ecn_dist.errors import UserError
from ecn_dist.methods import options as kinds
from ecn_dist.methods.options import (
    BatchSize,
    Count,
    Fraction,
    LossOptions,
    MemoryOptions,
    Natural,
    NotNegative,
    Positive,
    Range,
)

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _own_options() -> dict[str, type]:
    return {name: entry.options for name, entry in methods.METHODS.items() if entry.options is not None}


@dataclass(frozen=True)
class DataConfig:
    """pictures, and how they are read"""

    height: Annotated[int, Range(least=1, most=2048)] = 256
    """height of the network's input in pixels"""
    width: Annotated[int, Range(least=1, most=2048)] = 128
    """width of the network's input in pixels"""
    camera_style: bool = True
    """camera-invariance: a target picture appears in the style of a random camera (docs/formulas.md)"""
    random_erasing: Annotated[float, Range(least=0, most=1)] = 0.5
    """probability of random erasing, both domains"""
    streams: Count = 16
    """logical streams S a pass is cut into: a divisor of global_batch_size and a multiple of the ranks"""
    workers: Natural = 2
    """loader processes a rank and domain; 0 reads in the training process"""
    max_bad_samples: Natural = 0
    """pictures that cannot be decoded and are replaced, a pass and rank; one more ends the run"""


@dataclass(frozen=True)
class ModelConfig:
    """the network"""

    arch: str = "resnet50"
    """small_resnet, a torchvision classification network with a pooled feature, or timm/NAME (extra timm)"""
    weights: str = "imagenet"
    """imagenet (from torch's cache), none, or a file of state-dict tensors"""
    mean: list[float] | None = None
    """of red, green and blue (0 .. 1), with which the weights were made; none: ImageNet's"""
    std: list[float] | None = None
    """standard deviations beside model.mean"""
    embedding_dim: Annotated[int, Range(least=1, most=2**16)] = 4096
    """length D of the embedding, and of a memory row"""
    dropout: Fraction = 0.5
    """of the source head and of the target feature"""
    frozen_stages: Natural = 0
    """stages from the input on that are not trained (ResNets: 3 = stem, layer1, layer2)"""
    shortcut_batchnorm_trains: bool = False
    """leave the shortcut BatchNorms of frozen stages in training mode, as the published code does"""
    batchnorm: Literal["sync", "group", "local"] = "sync"
    """statistics over the global batch, as one process has, over groups of it, or over each rank's part"""
    batchnorm_group: int = 0
    """with batchnorm group: G consecutive pictures of the global batch that share statistics, whatever the ranks"""
    last_stride: Literal[1, 2] = 2
    """stride of the last stage; 1 keeps its resolution (ResNets)"""
    pooling: Literal["avg", "gem"] = "avg"
    """of the last feature map: mean, or generalised mean with a trained exponent"""
    channels_last: bool = False
    """keep weights and maps with the channels last: mostly faster for convolutions on a GPU, equal up to rounding"""

    def check(self, section: str) -> None:
        if self.weights == "none" and self.frozen_stages:
            found = f"{self.frozen_stages} stages would stay random, as {section}.weights is none"
            raise UserError(f"{section}.frozen_stages: {found}; set it to 0, or give weights")
        if (self.batchnorm == "group") != (self.batchnorm_group > 0):
            found = f"{section}.batchnorm_group: {self.batchnorm_group} with {section}.batchnorm {self.batchnorm}"
            raise UserError(f"{found}; a group of at least 1 picture belongs to batchnorm group, and to no other")


@dataclass(frozen=True)
class OptimConfig:
    """optimiser and schedule"""

    lr: Positive = 0.1
    """learning rate of the new layers"""
    backbone_lr: Positive = 0.01
    """learning rate of the backbone"""
    layer_decay: Annotated[float, Range(above=0, most=1)] = 1.0
    """factor of backbone_lr from a stage of the backbone to the one before it; 1: the same rate for all"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with Nesterov's momentum, or Adam (weight decay in the gradient)"""
    momentum: Fraction = 0.9
    """of SGD, with Nesterov's correction"""
    weight_decay: NotNegative = 5e-4
    """on every trained parameter"""
    schedule: Literal["step", "cosine"] = "step"
    """step: x0.1 at step_epoch; cosine: to 0 over the epochs"""
    step_epoch: Natural | list[Natural] = 40
    """epoch, or epochs, at which the step schedule divides by 10"""
    warmup_epochs: NotNegative = 0.0
    """epochs of linear warm-up from 0"""
    source_only_epochs: Natural = 0
    """epochs on the source alone before epoch 0; for networks that start at random"""


@dataclass(frozen=True)
class CheckpointConfig:
    """what is saved, and when"""

    every_steps: Natural = 0
    """steps between checkpoints; 0: at the end of every epoch"""
    keep: Count = 2
    """newest checkpoints that are kept"""
    keep_best: bool = False
    """also keep the one of the highest stepwise mAP on checkpoint.validation"""
    validation: str = ""
    """shard folder with query and gallery of other people than the test's: every checkpoint is evaluated on them"""
    keep_epochs: list[int] = field(default_factory=list)
    """also keep those of the ends of these epochs, as [10, 40]"""
    asynchronous: bool = False
    """write in the background; costs host memory of the size of this rank's part"""
    on_failure: Literal["stop", "continue"] = "stop"
    """whether a save that fails (a full disk) ends the run"""

    def check(self, section: str) -> None:
        if self.keep_best and not self.validation:
            others = f"name a shard folder with query and gallery of others as {section}.validation"
            raise UserError(f"{section}.keep_best: the best is not chosen by the test's people; {others}")


@dataclass(frozen=True)
class EvaluationConfig:
    """evaluation on the target's query and gallery"""

    every_epochs: Natural = 0
    """epochs between evaluations during training; 0: only at the end"""
    batch_size: Count = 128
    """pictures a rank embeds at once"""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """of engine deepspeed"""

    zero_stage: Literal[0, 1, 2] = 1
    """with engine deepspeed: divide among the ranks nothing (0), the optimiser's state (1), gradients too (2)"""


@dataclass(frozen=True)
class LoggingConfig:
    """what a run tells"""

    every_steps: Count = 10
    """steps between lines of metrics.jsonl; every line costs one small all-reduce"""
    tensorboard: bool = True
    """write tensorboard/"""
    figures: bool = True
    """at the end draw figures/ and write report.html"""


@dataclass(frozen=True)
class Config:
    """the run as a whole"""

    method: str = "ecn"
    """what is trained: camstyle, cluster, ecn, fmcl, hhl or source_only (docs/methods.md)"""
    source: str = ""
    """shard folder of the labelled source domain"""
    target: str = ""
    """shard folder of the target domain; its identities never reach a loss"""
    output_dir: str = ""
    """the run folder"""
    seed: Annotated[int, Range(least=0, below=2**63)] = 0
    """of every random choice"""
    epochs: int = 60
    """epochs of the method: passes over the source images, where it says no other length; 0 after source-only ones"""
    global_batch_size: BatchSize = 128
    """images of each domain in one step, over all ranks"""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16 and fp16 by autocast (fp16 with loss scaling); fp64 is for tests"""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    """what carries the gradients between ranks"""
    device: str = "auto"
    """auto (the accelerator, else the CPU), cpu, cuda, ..."""
    timeout_seconds: Positive = 300.0
    """a collective that waits longer fails"""
    resume: str = "auto"
    """auto (from the newest complete checkpoint of output_dir, if any), never, or the path of a checkpoint or run"""
    resume_changed: Literal["refuse", "allow"] = "refuse"
    """whether a run may continue with options or data that change its results"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    own: dict[str, Any] = field(default_factory=dict)
    """options of single methods, by the method's name; in YAML and on the command line sections beside the others"""

    def check(self) -> None:
        """Raise `UserError` for values that no run can have, without touching a file."""
        entry = methods.entry(self.method)
        for key in (*entry.domains, "output_dir"):
            if not getattr(self, key):
                raise UserError(f"{key}: is not set; give it in the --config file or as --{key}")
        kinds.check_ranges(self)
        for name, section in (vars(self) | self.own).items():
            if dataclasses.is_dataclass(section):
                kinds.check_ranges(section, f"{name}.")
            if hasattr(section, "check"):
                section.check(name)
        if self.epochs < 0 or self.epochs + self.optim.source_only_epochs < 1:
            raise UserError(f"epochs: {self.epochs} must be above 0, or 0 after source-only epochs")
        least = -self.optim.source_only_epochs  # those on the source alone are -1 and before
        if (first := min(self.checkpoint.keep_epochs, default=least)) < least:
            raise UserError(f"checkpoint.keep_epochs: {first} must be at least {least}")
        default = flatten(Config())
        for key, value in flatten(self).items():
            if methods.unread(self.method, key) and value != default[key]:
                raise UserError(f"{key}: method {self.method} has no use for it; leave it out, or choose the method")
        methods.load(self.method).check(flatten(self))


class _ConfigFile(ActionConfigFile):
    """`--config FILE`: what is wrong in a file is told with its name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if not Path(values).is_file():
            raise UserError(f"--config: there is no file {values!r}")
        try:
            check_yaml(Path(values).read_text(encoding="utf-8"), _sections(Config()))
            parser.parse_path(values)  # by itself too, as later options may override a wrong value, or hide whose it is
        except UnicodeDecodeError as error:
            raise UserError(f"{values}: is no UTF-8 text ({error.reason}); store it as UTF-8") from error
        except (yaml.YAMLError, ValueError) as error:  # the latter: a number that Python cannot make of its text
            raise UserError(f"{values}: is no YAML that can be read ({error})") from error
        except (UserError, ArgumentError) as error:
            raise UserError(f"{values}: {_with_nearest_key(str(error))}") from error
        super().__call__(parser, cfg, values, option_string)


class _Help(DefaultHelpFormatter):
    """Of types the numbers' and their ranges: choices stand at the option itself, and texts say what they are."""

    def _get_type_str(self, action: Any) -> str | None:
        # Without limits that nobody meets, which are given as powers of ten.
        kind = re.search(
            r"Annotated\[(int|float), (.*?)(?: and [a-z ]*[\d.]+e\+\d+)?\]", super()._get_type_str(action) or ""
        )
        return kind and f"{'a whole number' if kind[1] == 'int' else 'a number'} {kind[2]}"


def new_parser(prog: str, description: str) -> ArgumentParser:
    """A parser without options, whose errors are raised."""
    about: dict[str, Any] = {"usage": f"{prog} [--KEY VALUE ...]", "formatter_class": _Help}
    return ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False, **about)


def build_parser(prog: str, description: str) -> ArgumentParser:
    """A parser of every option of `Config`; callers may add their own beside them, and read both with `parse_with`."""
    parser = new_parser(prog, description)
    parser.add_argument("--config", action=_ConfigFile, help="YAML file of options; may be given more than once")
    parser.add_class_arguments(Config, None, skip={"own"})
    for name, options in _own_options().items():
        parser.add_class_arguments(options, name)
    return parser


def parse_with(parser: ArgumentParser, argv: list[str] | None) -> tuple[Config, Namespace]:
    """The configuration, and all else `parser` read. `UserError` names an unknown key with the nearest known one."""
    try:
        namespace = parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        raise UserError(_with_nearest_key(str(error))) from error
    own = {name: namespace[name] for name in _own_options()}
    shared = {f.name: namespace[f.name] for f in dataclasses.fields(Config) if f.name != "own"}
    return Config(**shared, own=own), namespace


def parse(argv: list[str] | None, prog: str, description: str) -> Config:
    """The configuration that YAML files (`--config`) and options give; raises as `parse_with`."""
    return parse_with(build_parser(prog, description), argv)[0]


def load(path: Path) -> Config:
    """The configuration stored in a run folder's config.yaml."""
    if not path.is_file():
        raise UserError(f"there is no {path}; name a run folder that `train` wrote, or a checkpoint inside one")
    return parse(["--config", str(path)], prog="ecn_dist", description="")


def dump(config: Config) -> str:
    """YAML of the whole resolved configuration; `load` reads it back."""
    return yaml.safe_dump(_sections(config), sort_keys=False)


def flatten(config: Config) -> dict[str, Any]:
    """{"memory.momentum": 0.01, ...}: every option by its dotted key."""
    return flat(_sections(config))


def _sections(config: Config) -> dict[str, Any]:
    """Options and sections as they stand in a YAML file; of a method's own section, the defaults where it has none."""
    sections = dataclasses.asdict(config)
    del sections["own"]
    own = {name: dataclasses.asdict(config.own.get(name) or options()) for name, options in _own_options().items()}
    return sections | own


def _with_nearest_key(message: str) -> str:
    """Name the nearest known key where the parser's message speaks of an unknown one."""
    places = r"unrecognized arguments: --|[Gg]roup '([\w.]+)' does not accept option '|[Oo]ption '(?=[\w.]+' is not)"
    match = re.search(rf"(?:{places})([\w.]+)", message)
    if match is None:
        return message
    key, known = ".".join(filter(None, match.groups())), list(flatten(Config()))
    names = {name.rpartition(".")[2]: name for name in known} | {name: name for name in known}
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {names[near[0]]}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown option {key!r}; {hint}"
