"""The run folder: what may be written into it, and what a finished run leaves there."""

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from ecn_dist import distributed
from ecn_dist.config import Config, dump, flatten, load
from ecn_dist.errors import UserError
from ecn_dist.files import write_atomically
from ecn_dist.reporting.run_reader import CARD, CONFIG, FIGURES, METRICS, REPORT, SUMMARY, WEIGHTS
from ecn_dist.training.checkpoint import CheckpointStore, damage, read_meta
from ecn_dist.training.tracking import log

FINISHED = "finished"  # in the summary; one without it was written as the last thing of a run

# Options that change how a run goes, not what comes out of it. The data are known by their index, not by their place.
_NO_RESULT = ("output_dir", "device", "timeout_seconds", "resume", "resume_changed", "data.workers", "source", "target")
_NO_RESULT_SECTIONS = ("checkpoint.", "evaluation.", "logging.", "data.cache")
# In full precision an engine is like a number of ranks: another order of the same sums.
_ROUNDING_ONLY = ("engine", "deepspeed.zero_stage")


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The options, as `flatten` gives them, that change results and differ: `key: stored -> wanted`.

    An option that the stored ones lack is younger than they are, and had its default's effect.
    """
    before, after = _plain(flatten(Config()) | stored), _plain(wanted)
    no_result = _NO_RESULT + (_ROUNDING_ONLY if after["precision"] in ("fp32", "fp64") else ())
    return [
        f"{key}: {before[key]} -> {value}"
        for key, value in after.items()
        if before[key] != value and key not in no_result and not key.startswith(_NO_RESULT_SECTIONS)
    ]


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """As they come back from a file: tuples as lists."""
    return json.loads(json.dumps(options))


def claim(config: Config, data: dict[str, str]) -> bool:
    """Make the run folder this run's own; False where this very run is there already, finished. Collective.

    `data` has the fingerprints of source and target. A folder that holds a run is only looked at: `begin` changes it,
    once it is certain that the run goes on. Raises `UserError` on all ranks where the folder holds another run, or
    `resume` cannot be followed.
    """
    folder = Path(config.output_dir)
    newest = CheckpointStore(folder / "checkpoints").newest()  # collective

    def on_main() -> bool:
        if not distributed.is_main():
            return True
        if (folder / CONFIG).is_file():
            return _is_to_train(folder, newest, config, data)
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"output_dir: {folder} has files in it but no run; name a new folder, or empty this one")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, dump(config))
        return True

    return distributed.broadcast_object(distributed.together(on_main))


def _is_to_train(folder: Path, newest: Path | None, config: Config, data: dict[str, str]) -> bool:
    if not _has_trained(folder):
        return True  # a mistake in the options or the data ended it before its first step
    if config.resume == "never":
        raise UserError(
            f"output_dir: {folder} already holds a run, and resume is never; name a new folder, delete this one, "
            "or continue it with --resume auto"
        )
    changed = differences(flatten(load(folder / CONFIG)), flatten(config))
    if newest is not None:
        changed += _other_data(read_meta(newest), data)
    if changed and config.resume_changed == "refuse":
        raise UserError(
            f"output_dir: {folder} already holds another run; these options differ: {'; '.join(changed)}. "
            "Name a new folder, give the stored options to continue that run, or continue it with the new ones by "
            "--resume_changed allow"
        )
    if changed or not is_finished(folder):
        return True
    if config.resume == "auto":
        return False
    raise UserError(
        f"output_dir: {folder} holds this very run, finished; its results are in {folder / SUMMARY}. "
        f"Name a new folder to train again from {config.resume}"
    )


def _has_trained(folder: Path) -> bool:
    """Whether a run in `folder` left anything of its training."""
    metrics = folder / METRICS
    return (
        (metrics.is_file() and metrics.stat().st_size > 0)
        or any((folder / "checkpoints").glob("*step-*"))
        or any((folder / name).is_file() for name in (SUMMARY, WEIGHTS))
    )


def begin(config: Config, checkpoint: Path | None) -> None:
    """Training begins, in a claimed run folder, from `checkpoint`: what an earlier end left goes.

    Weights, card, figures and report of an earlier end are not of this configuration, and a run cut off from here on
    is known by its checkpoints, of which later ones get other names; config.yaml is this run's. Call it when nothing
    can refuse the run any more. Collective; rank 0 acts.
    """
    folder = Path(config.output_dir)
    own = CheckpointStore(folder / "checkpoints")

    def on_main() -> None:
        if not distributed.is_main():
            return
        try:
            _remove_results(folder)
            if checkpoint is not None and checkpoint.absolute().parent == own.folder.absolute():
                for aside in own.set_aside_after(read_meta(checkpoint)["step"]):
                    log.warning("%s is of another continuation, and kept under this name", aside)
            write_atomically(folder / CONFIG, dump(config))
        except OSError as error:
            raise UserError(f"output_dir: {folder} cannot be written ({error}); mend that, or name another") from error

    distributed.together(on_main)


def _remove_results(folder: Path) -> None:
    """The summary, which says that the run is finished, goes first, and the weights last: a kill leaves no riddle."""
    if not (folder / SUMMARY).is_file() and not (folder / WEIGHTS).is_file():
        return  # the run has not come to its end yet, and a report or card was made by its user
    for name in (SUMMARY, CARD, REPORT):
        (folder / name).unlink(missing_ok=True)
    if (folder / FIGURES).is_dir():
        shutil.rmtree(folder / FIGURES)
    (folder / WEIGHTS).unlink(missing_ok=True)


def starting_point(config: Config, data: dict[str, str]) -> Path | None:
    """The checkpoint to continue from, or None for a fresh start, in a claimed run folder. Collective.

    `data` has the fingerprints of source and target. Raises `UserError` on all ranks where the checkpoint that `resume`
    names is none, or was written with other data or other options, unless `resume_changed` allows that. What killed
    runs left of checkpoints is removed.
    """
    own = CheckpointStore(Path(config.output_dir) / "checkpoints")
    if distributed.is_main():
        own.remove_unfinished()
    if config.resume == "never":
        return None
    if config.resume == "auto":
        checkpoint = own.newest()
    else:
        named = Path(config.resume)
        checkpoint = named if _named_by_user(named) else CheckpointStore(named / "checkpoints").newest()
        if checkpoint is None:
            raise UserError(
                f"resume: {named} is neither a complete checkpoint nor a run folder with one; it takes auto, never, or "
                "the path of either",
                on_all_ranks=True,
            )
    if checkpoint is not None:
        distributed.together(lambda: _check_same_training(checkpoint, config, data))
    return checkpoint


def _named_by_user(path: Path) -> bool:
    """Whether `path` is a complete checkpoint; one that is damaged is an error, as nobody asked for another."""

    def on_main() -> bool:
        if not distributed.is_main() or (path / "checkpoints").is_dir():
            return False
        if problem := damage(path):
            raise UserError(f"resume: {path} cannot be used, as {problem}")
        return True

    return distributed.broadcast_object(distributed.together(on_main))


def _other_data(meta: dict[str, Any], data: dict[str, str]) -> list[str]:
    stored = meta.get("data") or {}
    return [f"{domain}: other data" for domain in data if stored.get(domain) != data[domain]]


def _check_same_training(checkpoint: Path, config: Config, data: dict[str, str]) -> None:
    meta = read_meta(checkpoint)
    changed = _other_data(meta, data) + differences(meta.get("config", {}), flatten(config))
    if not changed:
        return
    if config.resume_changed == "refuse":
        raise UserError(
            f"{checkpoint} was written with other options; these differ: {'; '.join(changed)}. Give the stored ones, "
            "name a new output_dir, or continue with the new ones by --resume_changed allow"
        )
    log.warning("continuing from %s with changes: %s", checkpoint, "; ".join(changed))


def is_finished(folder: Path) -> bool:
    """Whether the run of this folder came to its end. Raises `UserError` as `read_summary` does."""
    summary = read_summary(folder)
    return summary is not None and bool(summary.get(FINISHED, True))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What `write_summary` wrote, or None where there is none. Raises `UserError` where it cannot be read."""
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove it and start the training again, which repeats its end alone"
        ) from error
    if not isinstance(summary, dict):
        raise UserError(f"{path}: holds no object; remove it and start the training again, which repeats its end alone")
    return summary


def write_summary(folder: Path, summary: dict[str, Any], *, finished: bool) -> None:
    """Write summary.json, atomically, with the machine's description. Rank 0 only.

    The report is made from it, so it is there before the report is: `finished` says that nothing more is to come.
    """
    machine = {
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerator": str(torch.accelerator.current_accelerator() or "none"),
    }
    write_atomically(folder / SUMMARY, json.dumps({FINISHED: finished} | summary | {"machine": machine}, indent=1))
