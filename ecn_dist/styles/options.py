"""The options of `stylize`: `Config`, `dump`, `flatten` and `load`, as `ecn_dist.config` has them for `train`."""

from argparse import ArgumentError
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml

from ecn_dist.config import new_parser
from ecn_dist.config_gate import read_yaml
from ecn_dist.data import SplitIndex
from ecn_dist.data.reader import ShardReader
from ecn_dist.errors import UserError
from ecn_dist.methods.options import BatchSize, Count, Natural, NotNegative, Positive, Range, check_ranges

DESCRIPTION = "Learn the styles of a shard folder's cameras, and write its pictures with copies in them (docs/use.md)."
METHOD = "stylize"  # in config.yaml, where a run of `train` has its method
MEASURED_PICTURES = 64
TALLEST = 256  # of the sizes that are taken from the data
_NO_RESULT = {
    *("data", "output", "checkpoint", "output_dir", "device", "workers", "timeout_seconds", "resume"),
    *("resume_changed", "checkpoint_steps", "log_steps"),
}


@dataclass(frozen=True)
class Config:
    """camera styles: what is learnt, how, and where it goes"""

    data: str = ""
    """shard folder whose training pictures get copies; any copies that it has are left out"""
    output: str = ""
    """shard folder to write: the same pictures with a copy in every other camera's style"""
    output_dir: str = ""
    """run folder of the training: checkpoints, losses, generator, pictures (default: OUTPUT-generator)"""
    generator: str = ""
    """write the copies with this trained generator instead of training one"""
    checkpoint: str = ""
    """run of a re-ID network that is asked how well it finds an original by its copy"""
    steps: Count = 200_000
    """steps of the discriminator"""
    batch_size: BatchSize = 16
    """pictures in one step, over all ranks"""
    height: Annotated[int, Range(least=0, most=2048)] = 0
    """of the generator's pictures, a multiple of 4; 0: the median of the data, at most 256"""
    width: Annotated[int, Range(least=0, most=2048)] = 0
    """the same; 0: in proportion to the data's"""
    generator_channels: Annotated[int, Range(least=1, most=1024)] = 64
    """of the generator's first convolution"""
    discriminator_channels: Annotated[int, Range(least=1, most=1024)] = 64
    """of the discriminator's first convolution"""
    blocks: Annotated[int, Range(least=0, most=64)] = 6
    """residual blocks of the generator"""
    skip: bool = False
    """the generator gives a change of the picture, and not a new one: learns sooner, keeps colours (docs/use.md)"""
    critic_steps: Count = 5
    """steps of the discriminator for one of the generator"""
    lr: Positive = 1e-4
    """of both, by Adam (0.5, 0.999); falls to 0 over the second half of the steps"""
    penalty_weight: NotNegative = 10.0
    """of the gradient penalty"""
    camera_weight: NotNegative = 1.0
    """of the cameras' cross-entropies"""
    cycle_weight: NotNegative = 10.0
    """of the difference between a picture and its copy's copy"""
    seed: Annotated[int, Range(least=0, below=2**63)] = 0
    """of every random choice"""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16 by autocast; fp64 is for tests"""
    device: str = "auto"
    """auto (the accelerator, else the CPU), cpu, cuda, ..."""
    workers: Natural = 2
    """loader processes a rank"""
    timeout_seconds: Positive = 300.0
    """a collective that waits longer fails"""
    checkpoint_steps: Count = 1000
    """steps between checkpoints"""
    log_steps: Count = 50
    """steps between lines of metrics.jsonl"""
    resume: str = "auto"
    """auto (from the newest complete checkpoint of output_dir, if any), never, or the path of a checkpoint or run"""
    resume_changed: Literal["refuse", "allow"] = "refuse"
    """whether training may continue with options or data that change its results"""

    def check(self) -> None:
        """Raise `UserError` for values that no run can have, without touching a file."""
        for key in ("data", "output"):
            if not getattr(self, key):
                raise UserError(f"--{key} is not set; name a shard folder")
        check_ranges(self)
        for key in ("height", "width"):
            if (value := getattr(self, key)) % 4 or value == 4:  # of which the generator would have one position
                raise UserError(f"{key}: {value} must be a multiple of 4, from 8 on, or 0")


def parse(argv: list[str] | None) -> Config:
    """The options of a command line, checked. Raises `UserError` with the option that is wrong."""
    parser = new_parser("ecn-dist stylize", DESCRIPTION)
    parser.add_class_arguments(Config, None)
    try:
        config = Config(**parser.parse_args(argv).as_dict())
    except ArgumentError as error:
        raise UserError(str(error)) from error
    config.check()
    return replace(config, output_dir=config.output_dir or f"{config.output.rstrip('/')}-generator")


def flatten(config: Config) -> dict[str, Any]:
    """The options that decide what is learnt."""
    return {key: value for key, value in asdict(config).items() if key not in _NO_RESULT}


def dump(config: Config) -> str:
    """YAML of all options; `load` reads it back."""
    return yaml.safe_dump({"method": METHOD} | asdict(config), sort_keys=False)


def load(path: Path) -> Config:
    """The options stored in a run folder's config.yaml. Raises `UserError` where they are none of `stylize`."""
    try:
        stored = read_yaml(path.read_text(encoding="utf-8"))
        if stored.pop("method") != METHOD:
            raise ValueError("it is of another command")
        return Config(**stored)
    except (UserError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no options of stylize ({error}); name another output_dir") from error


def fitting_size(split: SplitIndex, config: Config) -> tuple[int, int]:
    """(height, width) of the generator's pictures: those of `config`, and for 0 what fits the data."""
    height, width = config.height, config.width
    if height and width:
        return height, width
    reader = ShardReader()
    rows = np.linspace(0, len(split) - 1, min(MEASURED_PICTURES, len(split))).round().astype(int)
    sizes = [reader.read_picture(split, int(row)).size for row in rows]
    reader.close()
    median_width, median_height = np.median(sizes, axis=0)
    tall = median_height * width / median_width if width else min(median_height, TALLEST)
    height = height or _multiple(tall)
    return height, width or _multiple(median_width * height / median_height)


def _multiple(side: float) -> int:
    return max(8, round(side / 4) * 4)
