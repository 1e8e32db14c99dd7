"""Checkpoints: complete or absent, the newest found, a few kept.

checkpoints/step-00001200/   shard-*.safetensors (every rank's part) and meta.json (position, configuration)
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError

META = "meta.json"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointStore:
    """The checkpoints of one run, in `folder`; of those, the `keep` newest stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Tensor], meta: dict[str, Any]) -> Path:
        """Write the state before `step`, every rank its part. Collective; an error on any rank is raised on all.

        Everything goes to a temporary folder that is renamed when it is complete, so a kill at any moment leaves
        either the whole checkpoint or none.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f"tmp-{final.name}"
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        error = None
        try:
            distributed.save_sharded(state, temporary)
            if distributed.is_main():
                (temporary / META).write_text(json.dumps({"step": step, **meta}, indent=1))
        except OSError as failure:
            error = f"the checkpoint {final} could not be written ({failure}); earlier checkpoints are untouched"
        distributed.raise_together(error)
        if distributed.is_main():
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        distributed.barrier()
        return final

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and (p / META).is_file())

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None. Rank 0 looks, so that all ranks agree. Collective."""
        complete = self.complete() if distributed.is_main() else []
        return distributed.broadcast_object(complete[-1] if complete else None)


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Position and configuration of a checkpoint."""
    path = checkpoint / META
    if not path.is_file():
        raise UserError(f"{checkpoint} is no complete checkpoint: it has no {META}")
    return json.loads(path.read_text())


def load(checkpoint: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Fill `state` in place from a checkpoint written on any number of ranks; return its meta data. Collective."""
    meta = read_meta(checkpoint)
    distributed.load_sharded(state, checkpoint)
    return meta
