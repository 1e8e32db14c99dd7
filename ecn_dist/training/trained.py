"""A trained backbone from what a run left: its export, a checkpoint of it, or the run folder with either."""

import socket
from pathlib import Path

import torch

from ecn_dist import config as configuration
from ecn_dist import distributed, methods
from ecn_dist.config import Config
from ecn_dist.errors import UserError
from ecn_dist.methods.options import check_ranges
from ecn_dist.models import Backbone, convert_batchnorm, load_backbone
from ecn_dist.reporting.run_reader import CONFIG, WEIGHTS
from ecn_dist.training.building import build_backbone
from ecn_dist.training.checkpoint import META, CheckpointStore, damage, load


def load_trained(path: Path, device: torch.device, config_file: Path | None = None) -> tuple[Backbone, Config]:
    """The backbone that `path` holds, in evaluation mode on `device`, and the configuration it was trained with.

    `path` is a run folder (its exported weights, or else its newest checkpoint), a checkpoint folder, or a file of
    weights. The configuration is `config_file`, or the config.yaml of the run that `path` is or lies in. Rank 0
    decides what is loaded; `UserError` on all ranks where any of them does not see that. Collective.
    """
    config, place, is_checkpoint = distributed.on_main(lambda: _find(path, config_file))
    found = path / place
    _check_seen(found, is_checkpoint)
    torch.manual_seed(config.seed)
    backbone = distributed.together(lambda: build_backbone(config))
    if is_checkpoint:
        prefix = ".".join(filter(None, ("network", methods.load(config.method).EVALUATED, "backbone")))
        load(found, {f"{prefix}.{key}": tensor for key, tensor in backbone.state_dict().items()})
    else:
        distributed.together(lambda: load_backbone(backbone, str(found)))
    if config.precision == "fp64":
        backbone.double()
    backbone.to(device)
    convert_batchnorm(backbone, config.model.batchnorm, device, config.model.batchnorm_group)
    return backbone.eval(), config


def _find(path: Path, config_file: Path | None) -> tuple[Config, str, bool]:
    """The configuration, what is loaded within `path` (empty: itself), and whether it is a checkpoint."""
    found = (folder / CONFIG for folder in (path, *path.absolute().parents[:3]) if (folder / CONFIG).is_file())
    if (file := config_file or next(found, None)) is None:
        raise UserError(f"{path}: no {CONFIG} is in it or the folders above; name a run folder, or give --config")
    config = configuration.load(file)
    try:  # it may come from anybody, and be none that was trained with
        for section, options in (("", config), ("data.", config.data), ("model.", config.model)):
            check_ranges(options, section)
        config.model.check("model")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if (path / META).is_file() or path.is_file():
        return config, "", not path.is_file()
    if (path / WEIGHTS).is_file():
        return config, WEIGHTS, False
    if newest := CheckpointStore(path / "checkpoints").newest():
        return config, f"checkpoints/{newest.name}", True
    remedy = "name the run folder that `train` wrote, one of its checkpoints, or a file of weights"
    raise UserError(f"{path} holds neither {WEIGHTS} nor a complete checkpoint; {remedy}")


def _check_seen(found: Path, is_checkpoint: bool) -> None:
    problem = None
    try:
        if is_checkpoint:
            problem = damage(found, contents=distributed.is_main())  # one rank is enough to read all of it
        else:
            found.open("rb").close()
    except (OSError, UserError) as error:
        problem = str(error)
    told = problem and f"rank {distributed.rank()} on host {socket.gethostname()} cannot use {found}: {problem}"
    if problems := list(filter(None, distributed.gather_objects(told))):
        more = f"; and {len(problems) - 4} more ranks" if len(problems) > 4 else ""
        seen = "every rank must see the same files there, as on a file system that all hosts share"
        advice = f"Name another checkpoint or file of weights, or the run folder for its newest whole one; {seen}"
        raise UserError(f"{'; '.join(problems[:4])}{more}. {advice}", on_all_ranks=True)
