"""The run folder: what may be written into it, and what a finished run leaves there."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ecn_dist import distributed
from ecn_dist.config import Config, dump, flatten, load
from ecn_dist.engine.checkpoint import CheckpointStore
from ecn_dist.errors import UserError

CONFIG = "config.yaml"
SUMMARY = "summary.json"
WEIGHTS = "weights.safetensors"

# Options that change how a run goes, not what comes out of it.
_NO_RESULT = ("output_dir", "device", "timeout_seconds", "resume", "data.workers", "source", "target")
_NO_RESULT_SECTIONS = ("checkpoint.", "evaluation.", "logging.")


def differences(stored: Config, wanted: Config) -> list[str]:
    """The options that change results and differ, as `key: stored -> wanted`."""
    before, after = flatten(stored), flatten(wanted)
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in after
        if before[key] != after[key] and key not in _NO_RESULT and not key.startswith(_NO_RESULT_SECTIONS)
    ]


def claim(config: Config) -> Path | None:
    """Make the run folder this run's own, and say which checkpoint to continue from, or None. Collective.

    Raises `UserError` on all ranks where the folder holds a finished or another run, or `resume` cannot be followed.
    """
    folder = Path(config.output_dir)

    def on_main() -> None:
        if not distributed.is_main():
            return
        if (folder / CONFIG).is_file():
            _check_same_run(folder, config)
        elif folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"output_dir: {folder} has files in it but no run; name a new folder, or empty this one")
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / CONFIG, dump(config))

    distributed.together(on_main)
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return CheckpointStore(folder / "checkpoints", config.checkpoint.keep).newest()
    return Path(config.resume)


def _check_same_run(folder: Path, config: Config) -> None:
    if config.resume == "never":
        raise UserError(
            f"output_dir: {folder} already holds a run, and resume is never; name a new folder, delete this one, "
            "or continue it with --resume auto"
        )
    if changed := differences(load(folder / CONFIG), config):
        raise UserError(
            f"output_dir: {folder} already holds another run; these options differ: {'; '.join(changed)}. "
            "Name a new folder, or give the stored options to continue that run"
        )
    if (folder / SUMMARY).is_file():
        raise UserError(
            f"output_dir: {folder} holds this very run, finished; its results are in {folder / SUMMARY}. "
            "Name a new folder to train again"
        )


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, atomically, with the machine's description. Rank 0 only."""
    machine = {
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerator": str(torch.accelerator.current_accelerator() or "none"),
    }
    _write_atomically(folder / SUMMARY, json.dumps(summary | {"machine": machine}, indent=1))


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
