"""The run folder: who may write into it, from which checkpoint its run goes on, and how it ends."""

import fcntl
import json
import os
import platform
import shutil
import socket
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from ecn_dist import config as configuration
from ecn_dist import distributed
from ecn_dist.config_gate import flat
from ecn_dist.data import ShardIndex
from ecn_dist.errors import UserError
from ecn_dist.files import atomic_file, write_atomically
from ecn_dist.reporting import model_card, run_reader
from ecn_dist.reporting.run_reader import CARD, CONFIG, FIGURES, METRICS, REPORT, SUMMARY, WEIGHTS, read_metrics
from ecn_dist.training.checkpoint import CheckpointStore, damage, read_meta
from ecn_dist.training.tracking import log

LOCK = ".lock"  # held by rank 0, whose process and host it names
_SECONDS_UNTIL_SEEN = 5.0  # a network file system shows new files late

# Options that change how a run goes, not what comes out of it. The data are known by their index, not by their place,
# and of the device its kind counts, which is in the checkpoints.
_NO_RESULT = ("output_dir", "device", "timeout_seconds", "resume", "resume_changed", "data.workers", "source", "target")
_NO_RESULT_SECTIONS = ("checkpoint.", "evaluation.", "logging.")
# Options that may differ between the ranks of a run; of places it counts that one is given.
_OF_HOST = ("workers", "data.workers", "device", "resume")
_PLACES = ("output_dir", "output", "data", "source", "target", "checkpoint", "checkpoint.validation", "model.weights")
# In full precision an engine is like a number of ranks: another order of the same sums.
_ROUNDING_ONLY = ("engine", "deepspeed.zero_stage")


def fingerprints(domains: dict[str, ShardIndex]) -> dict[str, str]:
    """Those of the data that results depend on."""
    return {name: model_card.fingerprint(index) for name, index in domains.items() if name != "validation"}


def differences(stored: dict[str, Any], wanted: dict[str, Any], schema: Any = configuration) -> list[str]:
    """The options, as `flatten` gives them, that change results and differ: `key: stored -> wanted`.

    One that the stored ones lack is younger than they are, and had its default's effect. See `Run` on `schema`.
    """
    # As they come back from a file: tuples as lists.
    before, after = (json.loads(json.dumps(of)) for of in (schema.flatten(schema.Config()) | stored, wanted))
    no_result = _NO_RESULT + (_ROUNDING_ONLY if after["precision"] in ("fp32", "fp64") else ())
    return [
        f"{key}: {before[key]} -> {value}"
        for key, value in after.items()
        if before[key] != value and key not in no_result and not key.startswith(_NO_RESULT_SECTIONS)
    ]


class Run(AbstractContextManager):
    """One run and its folder: `claim`, `checkpoint`, `begin`, and `finish` at its end.

    As a context manager it gives the folder back to other processes. The methods raise `UserError` on all ranks alike.
    """

    def __init__(self, config: Any, data: dict[str, str], device: str = "cpu", schema: Any = configuration) -> None:
        """A run in `config.output_dir`, by `resume` and `resume_changed`.

        Args:
            config: the options, a `schema.Config`.
            data: the fingerprints of the data, by domain.
            device: the kind of the ranks' devices.
            schema: the module of the options: it has `Config`, `dump`, `flatten` and `load`, as `ecn_dist.config` does.
        """
        self.config, self.data, self.device, self.schema = config, data, device, schema
        self.folder = Path(config.output_dir)
        self.store = CheckpointStore(self.folder / "checkpoints")
        self._where = f"output_dir: {self.folder}"  # in errors
        self._lock: IO[str] | None = None

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def claim(self) -> bool:
        """Make the folder this run's own; False where this very run is there already, finished. Collective.

        A folder that holds a run is only looked at: `begin` changes it. Raises `UserError` where the folder holds
        another run or a running one, where `resume` cannot be followed, and where a rank does not see the folder or was
        started with other options or data.
        """
        self.check_alike()

        def on_main() -> str | None:
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"{self._where} is a file; name a folder")
            if not self.is_to_train():
                return None
            self.folder.mkdir(parents=True, exist_ok=True)
            owner = self._lock_folder()
            if not self.is_to_train():  # another process may have trained it in the meantime
                return None
            if not (self.folder / CONFIG).is_file():
                write_atomically(self.folder / CONFIG, self.schema.dump(self.config))
            return owner

        owner = distributed.on_main(on_main)
        if owner is not None:
            distributed.together(lambda: self._check_shared(owner))
        return owner is not None

    def check_alike(self) -> None:
        """Raise `UserError` on all ranks where one has other options or data than rank 0. Collective."""
        own = flat(yaml.safe_load(self.schema.dump(self.config)))
        own |= {key: "a path" for key in _PLACES if own.get(key) not in (None, "", "imagenet", "none")}
        own |= {f"data of {domain}": fingerprint[:12] for domain, fingerprint in self.data.items()}
        (_, first), *others = distributed.gather_objects((socket.gethostname(), own))
        for rank, (host, given) in enumerate(others, start=1):
            keys = [key for key in given if key not in _OF_HOST and given[key] != first.get(key)]
            if keys:
                differ = "; ".join(f"{key}: {first.get(key)} -> {given[key]}" for key in keys[:5])
                raise UserError(
                    f"rank {rank} on host {host} was started otherwise than rank 0: {differ}. Give all ranks the same "
                    "options and data",
                    on_all_ranks=True,
                )

    def checkpoint(self) -> Path | None:
        """The checkpoint to continue from, or None for a fresh start, in a claimed folder. Collective.

        What killed runs left of checkpoints is removed. Raises `UserError` where the checkpoint that `resume` names is
        none, or was written with other data or options, unless `resume_changed` allows that.
        """

        def on_main() -> Path | None:
            self.store.remove_unfinished()
            if self.config.resume == "never":
                return None
            found = self.store.newest() if self.config.resume == "auto" else _named_by_resume(Path(self.config.resume))
            if found and (changed := self._changes(f"{found} was written with other options", read_meta(found))):
                log.warning("continuing from %s with changes: %s", found, changed)
            return found

        return distributed.on_main(on_main)

    def begin(self, checkpoint: Path | None) -> None:
        """Training begins from `checkpoint`: an earlier end's results go, later checkpoints are renamed. Collective.

        config.yaml is this run's from here on: call it when nothing can refuse the run any more.
        """

        def on_main() -> None:
            read_metrics(self.folder / METRICS)  # a broken one refuses the run now, while everything is there
            with atomic_file(self.folder / CONFIG) as file:
                file.write(self.schema.dump(self.config).encode())
                file.flush()
                try:
                    # Any that this run does not go on from would be newer than what it saves, and so outlive it.
                    own = self.store.folder.absolute()
                    step = read_meta(checkpoint)["step"] if checkpoint and checkpoint.absolute().parent == own else -1
                    for aside in self.store.set_aside_after(step):
                        log.warning("%s is of another continuation, and kept under this name", aside)
                    # Where the run has not come to its end yet, a report or card was made by its user.
                    if (self.folder / SUMMARY).is_file() or (self.folder / WEIGHTS).is_file():
                        # The summary says that the run is finished: first it goes, and last the weights.
                        for name in (SUMMARY, CARD, REPORT):
                            (self.folder / name).unlink(missing_ok=True)
                        if (self.folder / FIGURES).is_dir():
                            shutil.rmtree(self.folder / FIGURES)
                        (self.folder / WEIGHTS).unlink(missing_ok=True)
                except OSError as error:
                    raise UserError(f"{self._where} cannot be written ({error}); mend that, or name another") from error

        distributed.on_main(on_main)

    def finish(self, summary: dict[str, Any], *, finished: bool) -> None:
        """Write summary.json with the machine's description; `finished`: nothing more is to come. Rank 0 only."""
        machine = {
            "host": platform.node(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerator": str(torch.accelerator.current_accelerator() or "none"),
        }
        text = json.dumps({run_reader.FINISHED: finished} | summary | {"machine": machine}, indent=1)
        write_atomically(self.folder / SUMMARY, text)

    def is_to_train(self) -> bool:
        """Whether there is something to do in the folder; False: this very run is there, finished. Changes nothing.

        Raises `UserError` where the folder holds another run, or what `resume` asks for cannot be. For rank 0.
        """
        folder, resume = self.folder, self.config.resume
        if not (folder / CONFIG).is_file():
            if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
                raise UserError(f"{self._where} has files in it but no run; name a new folder, or empty this one")
            return True
        metrics, ends = folder / METRICS, (folder / SUMMARY, folder / WEIGHTS)
        has_trained = (metrics.is_file() and metrics.stat().st_size) or any(end.is_file() for end in ends)
        if not has_trained and not any(self.store.folder.glob("*step-*")):
            return True  # a mistake in the options or the data ended it before its first step
        if resume == "never":
            remedy = "name a new folder, delete this one, or continue it with --resume auto"
            raise UserError(f"{self._where} already holds a run, and resume is never; {remedy}")
        try:
            stored = self.schema.flatten(self.schema.load(folder / CONFIG))
        except UserError as error:
            found = f"{self._where}/{CONFIG} cannot be read ({error})"
            raise UserError(f"{found}; bring it back, or name a new folder") from error
        whole = self.store.complete()
        meta = read_meta(whole[-1]) if whole else {"data": self.data}
        changes = self._changes(f"{self._where} already holds another run", meta | {"config": stored})
        if changes or not run_reader.is_finished(folder):
            return True
        if resume == "auto":
            return False
        found = f"{self._where} holds this very run, finished; its results are in {folder / SUMMARY}"
        raise UserError(f"{found}. Name a new folder to train again from {resume}")

    def _changes(self, what: str, meta: dict[str, Any]) -> str:
        """What changes results beside what wrote a checkpoint of these meta data; refused unless that is allowed."""
        stored = meta.get("data") or {}
        changed = [f"{domain}: other data" for domain in self.data if stored.get(domain) != self.data[domain]]
        if meta.get("device", self.device) != self.device:  # they draw other dropout masks
            changed.append(f"kind of device: {meta['device']} -> {self.device}")
        wanted = self.schema.flatten(self.config)
        changes = "; ".join(changed + differences(meta.get("config", {}), wanted, self.schema))
        if changes and self.config.resume_changed == "refuse":
            remedy = "Give the stored ones, name a new output_dir, or continue with these by --resume_changed allow"
            raise UserError(f"{what}; these differ: {changes}. {remedy}")
        return changes

    def _lock_folder(self) -> str:
        """Hold the folder for as long as rank 0's process lives; returns the owner that the lock then names."""
        # `flock` itself: where a file system has none, the file that `filelock` takes instead would outlive a kill.
        path, flags = self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            lock = os.fdopen(os.open(path, flags, 0o666), "r+", encoding="utf-8")
        except OSError as error:  # such as a link, which would have another file emptied
            raise UserError(f"output_dir: {path} cannot be opened ({error.strerror}); remove it") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read() or "another process"
            lock.close()
            remedy = "wait for its end, end it, or name a new folder"
            raise UserError(f"{self._where} is being written by {owner}; {remedy}") from error
        except OSError as error:
            log.warning("output_dir: no lock keeps a second training out of %s (%s)", self.folder, error)
        self._lock, owner = lock, f"process {os.getpid()} on {socket.gethostname()}"
        lock.truncate(0)
        lock.write(owner)
        lock.flush()
        return owner

    def _check_shared(self, owner: str) -> None:
        """Raise `UserError` where this rank does not see what rank 0 wrote."""
        deadline = time.monotonic() + _SECONDS_UNTIL_SEEN
        lock = self.folder / LOCK
        while not lock.is_file() or lock.read_text(encoding="utf-8") != owner:
            if time.monotonic() > deadline:
                place = f"rank {distributed.rank()} on host {socket.gethostname()} does not see in {self.folder}"
                shared = "it must lie on a file system that all hosts share"
                raise UserError(f"output_dir: {place} what rank 0 wrote there; {shared}")
            time.sleep(0.1)


def _named_by_resume(path: Path) -> Path:
    """The checkpoint that `resume` names; one that is damaged is an error, as nobody asked for another."""
    if not (path / "checkpoints").is_dir():
        if problem := damage(path):
            raise UserError(f"resume: {path} cannot be used, as {problem}")
        return path
    if newest := CheckpointStore(path / "checkpoints").newest():
        return newest
    raise UserError(f"resume: {path} has no complete checkpoint; it takes auto, never, a checkpoint, or a run with one")
