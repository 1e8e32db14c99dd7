"""Checkpoints: complete or absent, the newest found, a few kept. See docs/resume.md.

checkpoints/step-00001200/   shard-*.safetensors (every rank's part) and meta.json (position, configuration, file sizes)
checkpoints/tmp-step-...     one being written, or what a killed run left of one
"""

import json
import os
import re
import shutil
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.training.tracking import log

META = "meta.json"
_NAME = re.compile(r"step-(\d{8})")
_TEMPORARY = "tmp-"
# State under this prefix belongs to a rank: it is read back on the number of ranks that wrote it, and on no other.
OF_RANKS = "ranks."


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay."""

    newest: int = 2
    best: bool = False  # the one of the highest mAP, of those whose meta data hold an evaluation
    epochs: tuple[int, ...] = ()  # those written at the end of these epochs

    def chosen(self, metas: list[dict[str, Any]]) -> set[int]:
        """Places in `metas`, which are in the order of steps, oldest first."""
        places = range(len(metas))
        kept = set(places[-self.newest :])
        kept |= {at for at in places if metas[at].get("ended_epoch") in self.epochs}
        evaluated = [at for at in places if metas[at].get("evaluation")]
        if self.best and evaluated:
            kept.add(max(evaluated, key=lambda at: metas[at]["evaluation"]["mAP"]))
        return kept


class CheckpointStore:
    """The checkpoints of one run, in `folder`.

    With `asynchronous` a save returns once this rank's part is copied to the host; a thread on every rank writes it.
    The threads exchange nothing: the checkpoint gets its name in `finish`, a collective that the ranks call together
    at a later step.
    """

    def __init__(self, folder: Path, keep: Keep | int = 2, *, asynchronous: bool = False) -> None:
        self.folder = folder
        self.keep = Keep(keep) if isinstance(keep, int) else keep
        self.asynchronous = asynchronous
        self._in_flight: _Writing | None = None

    def save(self, step: int, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write the state before `step`, every rank its part. Collective.

        Everything goes to a temporary folder that is renamed when it is complete, so a kill at any moment leaves
        either the whole checkpoint or none. An error of the disk on any rank, in this save or in one still in flight,
        is raised on all ranks as `UserError`, and earlier checkpoints are untouched.
        """
        self.finish()
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        _together("could not be begun", final, lambda: _make_empty(temporary) if distributed.is_main() else None)
        part = distributed.PendingSave(state, temporary)
        meta = {"step": step, "world_size": distributed.world_size()} | meta
        self._in_flight = _Writing(part, temporary, final, meta)
        if not self.asynchronous:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its part of a save."""
        return self._in_flight is not None and self._in_flight.thread.is_alive()

    def finish(self) -> None:
        """Wait for the save in flight and complete it. Does nothing where there is none. Collective."""
        writing, self._in_flight = self._in_flight, None
        if writing is None:
            return
        writing.thread.join()
        if writing.bug is not None:
            raise writing.bug
        try:
            _together("could not be written", writing.final, writing.raise_error)
            files = distributed.gather_objects((socket.gethostname(), writing.files))
            _together("could not be completed", writing.final, lambda: self._complete(writing, files))
        except UserError:
            if distributed.is_main():  # it may be the disk that is full
                shutil.rmtree(writing.temporary, ignore_errors=True)
            raise

    def _complete(self, writing: "_Writing", files: list[tuple[str, dict[str, int]]]) -> None:
        if not distributed.is_main():
            return
        sizes: dict[str, int] = {}
        for rank, (host, parts) in enumerate(files):
            for name in parts:
                if not (writing.temporary / name).is_file():
                    raise UserError(
                        f"the checkpoint {writing.final} could not be completed: rank {rank} wrote {name} on host "
                        f"{host}, and rank 0 on {socket.gethostname()} does not see it. output_dir must lie on a file "
                        "system that all hosts share"
                    )
            sizes |= parts
        _write_durably(writing.temporary / META, json.dumps(writing.meta | {"files": sizes}, indent=1))
        if writing.final.exists():  # a damaged one, which `newest` passed over
            shutil.rmtree(writing.final)
        writing.temporary.rename(writing.final)
        _sync(self.folder)
        complete = self.complete()
        kept = self.keep.chosen([read_meta(checkpoint) for checkpoint in complete])
        for at, old in enumerate(complete):
            if at not in kept:
                _remove(old)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return [checkpoint for checkpoint in self._named() if not damage(checkpoint)]

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None. Rank 0 looks, so that all ranks agree. Collective.

        One whose files are not as they were written (a file system that crashed) is passed over with a warning.
        """
        found = None
        for checkpoint in reversed(self._named()) if distributed.is_main() else ():
            problem = damage(checkpoint)
            if not problem:
                found = checkpoint
                break
            log.warning("%s is passed over, as %s", checkpoint, problem)
        return distributed.broadcast_object(found)

    def remove_unfinished(self) -> None:
        """Remove what killed runs left of checkpoints. For rank 0, before anything is saved."""
        if self.folder.is_dir():
            for left in self.folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(left)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints after `step`: a run that goes on from `step` is not to meet them. For rank 0."""
        aside = []
        for checkpoint in self._named():
            if int(checkpoint.name.removeprefix("step-")) > step:
                aside.append(checkpoint.rename(checkpoint.with_name(f"superseded-{checkpoint.name}")))
        return aside

    def _named(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))


class _Writing:
    """One save in flight on this rank: a thread that writes the part."""

    def __init__(self, part: distributed.PendingSave, temporary: Path, final: Path, meta: dict[str, Any]) -> None:
        self.temporary, self.final, self.meta = temporary, final, meta
        self.files: dict[str, int] = {}
        self._error: OSError | None = None
        self.bug: Exception | None = None
        self._part = part
        # A daemon: where the run ends by an error the others cannot complete the checkpoint either.
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        try:
            self.files = self._part.write()
        except OSError as error:
            self._error = error
        except Exception as bug:  # raised by `finish`, in the thread that can show it
            self.bug = bug

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where every file is there in its full size."""
    try:
        meta = read_meta(checkpoint)
    except UserError as error:
        return str(error)
    for name, size in meta["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"its {name} is missing"
        if (found := path.stat().st_size) != size:
            return f"its {name} has {found} bytes where {META} says {size}"
    return None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Position and configuration of a checkpoint. Raises `UserError` where there are none to be read."""
    path = checkpoint / META
    if not path.is_file():
        raise UserError(f"{checkpoint} is no complete checkpoint: it has no {META}")
    try:
        meta = json.loads(path.read_text())
        if meta.keys() >= {"step", "world_size", "files"}:
            return meta
        raise ValueError("it lacks step, world_size or files")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{checkpoint} is no complete checkpoint: its {META} is damaged ({error})") from error


def load(checkpoint: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Fill `state` in place from a checkpoint written on any number of ranks; return its meta data. Collective.

    Entries under `ranks.` are taken out of `state` where another number of ranks wrote the checkpoint.
    """
    meta = distributed.together(lambda: read_meta(checkpoint))
    if meta["world_size"] != distributed.world_size():
        for key in [key for key in state if key.startswith(OF_RANKS)]:
            del state[key]
    distributed.load_sharded(state, checkpoint)
    return meta


def _together(what: str, checkpoint: Path, action: Any) -> None:
    """`action` on every rank; an error of the disk on any of them is raised on all."""

    def with_advice() -> None:
        try:
            action()
        except OSError as error:
            raise UserError(
                f"the checkpoint {checkpoint} {what} ({error}); earlier checkpoints are untouched. Free space on its "
                "disk or give another output_dir, and start again: the run continues from the newest one"
            ) from error

    distributed.together(with_advice)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _remove(checkpoint: Path) -> None:
    # Under another name first: half a checkpoint must not stand under a name that promises a whole one.
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(_TEMPORARY + checkpoint.name)))


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
