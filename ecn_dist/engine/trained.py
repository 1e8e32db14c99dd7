"""A trained backbone from what a run left: its export, a checkpoint of it, or the run folder with either."""

from pathlib import Path

import torch

from ecn_dist import config as configuration
from ecn_dist import distributed
from ecn_dist.config import Config
from ecn_dist.engine import run_folder
from ecn_dist.engine.checkpoint import META, CheckpointStore, load
from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, convert_batchnorm, load_backbone


def load_trained(path: Path, device: torch.device, config_file: Path | None = None) -> tuple[Backbone, Config]:
    """The backbone that `path` holds, in evaluation mode on `device`, and the configuration it was trained with.

    `path` is a run folder (its exported weights, or else its newest checkpoint), a checkpoint folder, or a file of
    weights. The configuration is `config_file`, or the config.yaml of the run that `path` is or lies in. Collective.
    """
    config = distributed.together(lambda: configuration.load(config_file or _config_of(path)))
    torch.manual_seed(config.seed)
    backbone = distributed.together(lambda: Backbone(config.model.arch, config.data.height, config.data.width))
    export = path / run_folder.WEIGHTS if path.is_dir() else path
    if export.is_file():
        distributed.together(lambda: load_backbone(backbone, str(export)))
    else:
        _load_from_checkpoint(backbone, path)
    if config.precision == "fp64":
        backbone.double()
    backbone.to(device)
    convert_batchnorm(backbone, config.model.batchnorm, device)
    return backbone.eval(), config


def _config_of(path: Path) -> Path:
    for folder in (path, *path.absolute().parents[:3]):
        if (folder / run_folder.CONFIG).is_file():
            return folder / run_folder.CONFIG
    raise UserError(
        f"{path}: neither it nor the folders above it hold a {run_folder.CONFIG}; name a run folder, or give --config"
    )


def _load_from_checkpoint(backbone: Backbone, path: Path) -> None:
    checkpoint: Path | None = path
    if not (path / META).is_file():
        checkpoint = CheckpointStore(path / "checkpoints", keep=1).newest()
    if checkpoint is None:
        raise UserError(
            f"{path} holds neither {run_folder.WEIGHTS} nor a complete checkpoint; name the run folder that `train` "
            "wrote, one of its checkpoints, or a file of weights",
            on_all_ranks=True,
        )
    load(checkpoint, {f"network.backbone.{key}": tensor for key, tensor in backbone.state_dict().items()})
