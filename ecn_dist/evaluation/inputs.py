"""What is given to an evaluation, checked on all ranks together.

Shape letters: C cameras.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.errors import UserError


@dataclass(frozen=True)
class Pictures:
    """Features where they were given, labels on the device of computation; `error` says what is wrong with them."""

    features: Tensor
    pids: Tensor
    camids: Tensor | None
    error: str | None

    @classmethod
    def of(cls, name: str, features: Tensor, pids: Tensor, camids: Tensor | None, device: torch.device) -> "Pictures":
        features, pids = torch.as_tensor(features).detach(), torch.as_tensor(pids)
        labels = [pids] if camids is None else [pids, torch.as_tensor(camids)]
        error = None
        if features.ndim != 2 or not features.is_floating_point():
            error = f"{name} features must be floats of shape (pictures, length), not {_described(features)}"
        for what, values in zip(("pids", "camids"), labels, strict=False):
            if values.is_floating_point() or values.shape != features.shape[:1]:
                needed = f"{name} {what} must be integers, one for each of {len(features)} features"
                error = error or f"{needed}, not {_described(values)}"
        labels = [values.to(device, torch.int64) for values in labels]
        return cls(features, labels[0], labels[1] if len(labels) > 1 else None, error)

    def rows(self, part: slice) -> "Pictures":
        camids = None if self.camids is None else self.camids[part]
        return Pictures(self.features[part], self.pids[part], camids, self.error)


def _described(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"


def agree(query: Pictures, gallery: Pictures, camera_pairs: bool) -> tuple[int, Tensor]:
    """Check the ranks' inputs together; the place of this rank's first picture, and all camids (C,) ascending."""
    error = query.error or gallery.error
    if error is None and query.features.shape[1] != gallery.features.shape[1]:
        error = f"query features are {query.features.shape[1]} long and gallery features {gallery.features.shape[1]}"
    if error is None and (query.camids is None) != (gallery.camids is None):
        error = "camids are given for only one of query and gallery; give both, or None for both"
    if error is None and camera_pairs and query.camids is None:
        error = "a table of camera pairs needs camids"
    distributed.raise_together(error)
    camids: list[int] = []
    if query.camids is not None and gallery.camids is not None:
        camids = torch.cat([query.camids, gallery.camids]).unique().tolist()
    facts = distributed.gather_objects(
        ((*query.features.shape, int(query.pids.sum()), query.camids is None), len(gallery.pids), camids)
    )
    queries, sizes, ranks_camids = zip(*facts, strict=True)
    if len(set(queries)) > 1:
        given = "; ".join(f"rank {at}: {shape[:2]}" for at, shape in enumerate(queries))
        raise UserError(
            f"every rank must give the same queries; their shapes and pids differ ({given})", on_all_ranks=True
        )
    known = sorted(set().union(*ranks_camids))
    return sum(sizes[: distributed.rank()]), torch.tensor(known, dtype=torch.int64, device=query.pids.device)
