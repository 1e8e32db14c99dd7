"""Checkpoints: complete or absent, the newest found, a few kept. See docs/resume.md.

checkpoints/step-00001200/   shard-*.safetensors (every rank's part) and meta.json (position, configuration, sha256s)
checkpoints/tmp-step-...     one being written, or what a killed run left of one
"""

import json
import os
import re
import reprlib
import shutil
import socket
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError
from ecn_dist.reporting.run_reader import number
from ecn_dist.training.tracking import log

T = TypeVar("T")
META = "meta.json"
FORMAT_VERSION = 2  # 1 is release 0.1's, whose meta data have neither a version nor sha256s
MAX_META_BYTES = 16 << 20
_TEMPORARY = "tmp-"
# State under this prefix belongs to a rank: it is read back on the number of ranks that wrote it, and on no other.
OF_RANKS = "ranks."
INTERVAL = f"{OF_RANKS}interval"  # the sums of an `Interval`
Files = dict[str, tuple[int, str]]  # size in bytes and sha256 by name, of what one rank wrote


class CheckpointStore:
    """The checkpoints of one run, in `folder`: the newest `keep`, the `best`, and those of the ends of `keep_epochs`.

    With `asynchronous` a save returns once this rank's part is copied to the host; a thread on every rank writes it.
    The threads exchange nothing: the checkpoint gets its name in `finish`, a collective that the ranks call together
    at a later step.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        *,
        keep_best: bool = False,
        keep_epochs: Collection[int] = (),
        asynchronous: bool = False,
    ) -> None:
        self.folder, self.keep, self.keep_best, self.keep_epochs = folder, keep, keep_best, keep_epochs
        self.asynchronous = asynchronous
        self._in_flight: tuple[Future[Files], dict[str, Any]] | None = None  # and the meta data
        # Its thread ends before the interpreter does: one cut off inside torch would abort the process.
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write the state before `step`, every rank its part. Collective.

        Everything goes to a temporary folder that is renamed when complete: a kill leaves a whole checkpoint or none. A
        disk's error on any rank, in this save or one in flight, is raised on all as `UserError`; earlier ones stay.
        """
        self.finish()
        temporary = self._path(step, _TEMPORARY)

        def begin() -> None:
            if distributed.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        self._together(step, begin)
        part = distributed.PendingSave(state, temporary)
        meta = {"version": FORMAT_VERSION, "step": step, "world_size": distributed.world_size()} | meta
        self._in_flight = self._writer.submit(part.write), meta
        if not self.asynchronous:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its part of a save."""
        return self._in_flight is not None and not self._in_flight[0].done()

    def finish(self) -> None:
        """Wait for the save in flight and complete it. Does nothing where there is none. Collective."""
        if self._in_flight is None:
            return
        (files, meta), self._in_flight = self._in_flight, None
        step, main = meta["step"], distributed.is_main()
        try:
            parts = distributed.gather_objects((socket.gethostname(), self._together(step, files.result)))
            self._together(step, lambda: self._complete(meta, parts) if main else None)
        except UserError:
            if main:  # it may be the disk that is full
                shutil.rmtree(self._path(step, _TEMPORARY), ignore_errors=True)
            raise
        if main:
            self._prune()

    def _complete(self, meta: dict[str, Any], parts: list[tuple[str, Files]]) -> None:
        final, temporary = self._path(meta["step"]), self._path(meta["step"], _TEMPORARY)
        sizes, checksums = {}, {}
        for rank, (host, part) in enumerate(parts):
            for name, (sizes[name], checksums[name]) in part.items():
                if not (temporary / name).is_file():
                    lost = f"rank 0 on {socket.gethostname()} does not see {name} of rank {rank} on {host}"
                    raise UserError(f"{final}: {lost}; output_dir must lie on a file system that all hosts share")
        (temporary / META).write_text(json.dumps(meta | {"files": sizes, "sha256": checksums}, indent=1))
        _sync(temporary / META)
        _sync(temporary)
        if final.exists():  # a damaged one, which `newest` passed over
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(self.folder)

    def _path(self, step: int, prefix: str = "") -> Path:
        return self.folder / f"{prefix}step-{step:08d}"

    def _together(self, step: int, action: Callable[[], T]) -> T:
        advice = "earlier checkpoints are untouched; mend this or give another output_dir, and start again to continue"
        return distributed.together(action, f"the checkpoint {self._path(step)} could not be written ({advice})")

    def _prune(self) -> None:
        """Remove what is not to be kept. The save has succeeded: a failure here is no error of it."""
        try:
            best = (self.best() if self.keep_best else None) or {}
            for old in self.complete()[: -self.keep]:
                meta = read_meta(old)
                if meta["step"] != best.get("step") and meta.get("ended_epoch") not in self.keep_epochs:
                    # Under another name first: half a checkpoint must not have a name that promises a whole one.
                    shutil.rmtree(old.rename(old.with_name(_TEMPORARY + old.name)))
        except (OSError, UserError) as error:
            log.warning("%s: an old checkpoint could not be removed (%s)", self.folder, error)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first; contents are not compared."""
        return [checkpoint for checkpoint in self.named() if not damage(checkpoint, contents=False)]

    def best(self) -> dict[str, Any] | None:
        """The meta data of the complete checkpoint with the highest stepwise mAP on the newest one's validation data.

        Not the trapezoid's, which rewards a network whose pictures all tie. Of equal ones the first; None without any.
        """
        metas = [meta for meta in map(read_meta, self.complete()) if meta.get("validation")]
        compared = (meta for meta in metas if meta["validation"]["data"] == metas[-1]["validation"]["data"])
        return max(compared, key=lambda meta: meta["validation"]["mAP_stepwise"], default=None)

    def newest(self) -> Path | None:
        """The newest whole checkpoint as this rank sees it, or None; a damaged one is passed over with a warning."""
        for checkpoint in reversed(self.named()):
            if not (problem := damage(checkpoint)):
                return checkpoint
            log.warning("%s is passed over, as %s", checkpoint, problem)
        return None

    def named(self) -> list[Path]:
        """What has a checkpoint's name, oldest first, whole or not."""
        return sorted(self.folder.glob(f"step-{8 * '[0-9]'}"))

    def remove_unfinished(self) -> None:
        """Remove what killed runs left of checkpoints. For rank 0, before anything is saved."""
        for left in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints after `step`: a run that goes on from `step` is not to meet them. For rank 0."""
        aside = []
        for checkpoint in self.named():
            if int(checkpoint.name.removeprefix("step-")) > step:
                names = (f"superseded-{f'{n}-' * (n > 1)}{checkpoint.name}" for n in count(1))
                free = next(path for path in map(checkpoint.with_name, names) if not path.exists())
                aside.append(checkpoint.rename(free))
        return aside


class _Damaged(UserError):
    """Of a checkpoint that cannot be used; others may be."""


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is in a range of integers, matches a text's pattern or {keys' pattern: kind}, or keeps a rule."""
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if isinstance(kind, str):
        return isinstance(value, str) and re.fullmatch(kind, value) is not None
    if isinstance(kind, dict):
        [(pattern, of)] = kind.items()
        return isinstance(value, dict) and all(re.fullmatch(pattern, key) and _fits(value[key], of) for key in value)
    return kind(value)


def _plain(value: Any) -> bool:
    return not isinstance(value, list | dict) and len(str(value)) < 5000


def _figures(value: Any) -> bool:
    return isinstance(value, dict) and number(value.get("mAP_stepwise")) is not None


# What meta data may hold; of other keys nothing is read.
_COUNT, _FILE, _WORD = range(2**53), r"[\w-]+\.safetensors", r"\w{1,99}"
_KINDS: dict[str, Any] = {
    "step": range(10**8),
    "world_size": range(1, 2**53),
    "files": {_FILE: _COUNT},
    "sha256": {_FILE: "[0-9a-f]{64}"},
    **dict.fromkeys(("skipped_steps", "replaced_pictures"), _COUNT),
    "timeline": {_WORD: _COUNT},
    "sizes": {_WORD: _COUNT},
    "data": {_WORD: r"\w{0,99}"},
    "device": _WORD,
    "config": {r"[\w.]{1,99}": lambda value: all(map(_plain, value if isinstance(value, list) else [value]))},
    "ended_epoch": lambda value: value is None or type(value) is int,
    "evaluation": lambda value: value is None or _figures(value),
    "validation": lambda value: value is None or (_figures(value) and _fits(value.get("data"), _WORD)),
}


def damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, or None. Raises `UserError` for a later version's, which is not damaged.

    `contents` also compares the files' sha256, which checkpoints of release 0.1 lack.
    """
    try:
        meta = read_meta(checkpoint)
    except _Damaged as error:
        return str(error)
    for name, size in meta["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"its {name} is missing"
        if (found := path.stat().st_size) != size:
            return f"its {name} has {found} bytes where {META} says {size}"
        written = meta.get("sha256", {}).get(name)
        if contents and written and distributed.checksum(path) != written:
            return f"its {name} is not as it was written: its sha256 is another than {META} says"
    strays = sorted(path.name for path in checkpoint.glob("*.safetensors") if path.name not in meta["files"])
    return f"{META} does not know its {strays[0]}; remove that file" if strays else None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Position and configuration of a checkpoint. Raises `UserError` where there are none to be read."""
    path = checkpoint / META
    if not path.is_file():
        raise _Damaged(f"{checkpoint} is no complete checkpoint: it has no {META}")
    try:
        with path.open("rb") as file:
            meta = json.loads(file.read(MAX_META_BYTES))  # of a longer one, the end is missing
        version = meta.get("version", 1)
        if version not in range(1, FORMAT_VERSION + 1):
            known = f"this program reads versions up to {FORMAT_VERSION}; continue with the release that wrote it"
            raise UserError(f"{path} has format version {version!r}, and {known}, or a later one")
        for key in ("step", "world_size", "files", *(["sha256"] if version > 1 else [])):
            if key not in meta:
                raise ValueError(f"it lacks {key}")
        for key, kind in _KINDS.items():
            if key in meta and not _fits(meta[key], kind):
                raise ValueError(f"its {key} is {reprlib.repr(meta[key])}")
        if not meta["files"] or (version > 1 and meta["sha256"].keys() != meta["files"].keys()):
            raise ValueError("its files are none, or not those of its sha256")
        if re.fullmatch(r"step-[0-9]{8}", checkpoint.name) and checkpoint.name != f"step-{meta['step']:08d}":
            raise ValueError(f"its step is {meta['step']}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(f"{checkpoint} is no complete checkpoint: its {META} is damaged ({error})") from error
    return meta


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
