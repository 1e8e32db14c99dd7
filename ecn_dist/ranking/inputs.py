"""What is given to an evaluation, checked on all ranks together.

Shape letters: Q queries, G gallery pictures, D feature length, C cameras.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.distributed import RowPartition
from ecn_dist.errors import UserError


def check_features(query: Tensor, gallery: Tensor, gallery_sharded: bool) -> tuple[Tensor, Tensor, int]:
    """Features (Q, D) and (G, D) as tensors, of the gallery this rank's part, and the place of its first picture.

    A rank's part is what it gives with `gallery_sharded`, else its share of what all give alike. Collectives: gathers
    of errors, shapes and sizes; a `UserError` on every rank if anything does not fit or the gallery is empty.
    """
    query, gallery = torch.as_tensor(query).detach(), torch.as_tensor(gallery).detach()
    error = _feature_error("query", query) or _feature_error("gallery", gallery)
    if error is None and query.shape[1] != gallery.shape[1]:
        error = f"query features are {query.shape[1]} long and gallery features {gallery.shape[1]}"
    if error is None and len(query) == 0:
        error = "there are no queries"
    distributed.raise_together(error)
    _check_same_queries((f"{len(query)} queries", f"length {query.shape[1]}"))
    part = slice(0, len(gallery)) if gallery_sharded else own_share(len(gallery))
    if not distributed.any_rank(len(gallery) > 0):
        raise UserError("the gallery has no pictures", on_all_ranks=True)
    return query, gallery[part], first_of_part(part.stop - part.start)


def own_share(size: int) -> slice:
    """This rank's rows of something that all ranks have."""
    partition = RowPartition(size, distributed.world_size())
    return slice(partition.start(distributed.rank()), partition.stop(distributed.rank()))


def first_of_part(size: int) -> int:
    """The place of this rank's first row, where each rank has a part of `size` rows, in rank order. Collective."""
    return sum(distributed.gather_objects(size)[: distributed.rank()])


def _feature_error(name: str, features: Tensor) -> str | None:
    if features.ndim != 2 or not features.is_floating_point():
        return f"{name} features must be floats of shape (pictures, length), not {_described(features)}"
    return None


def _described(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"


def _check_same_queries(facts: tuple) -> None:
    given = distributed.gather_objects(facts)
    if len(set(given)) > 1:
        shown = "; ".join(f"rank {at}: {facts}" for at, facts in enumerate(given))
        raise UserError(f"every rank must give the same queries, but they differ: {shown}", on_all_ranks=True)


@dataclass(frozen=True)
class NumberedLabels:
    """Labels on the device of computation; cameras are numbered 0..C-1, alike on all ranks."""

    query_pids: Tensor  # (Q,)
    query_cameras: Tensor  # (Q,)
    gallery_pids: Tensor  # (G,) of this rank's part
    gallery_cameras: Tensor  # (G,)
    camids: Tensor  # (C,) ascending: the camids by their numbers; empty for data without cameras


def check_labels(
    query: tuple[int, Tensor, Tensor | None],
    gallery: tuple[int, Tensor, Tensor | None],
    gallery_sharded: bool,
    device: torch.device,
) -> NumberedLabels:
    """Check and number labels, each given as the number of features, pids and camids.

    Without camids (None) all queries are of one camera and the gallery of another, so that nothing is junk.
    Collectives: gathers of errors and camids; a `UserError` on every rank if anything does not fit.
    """
    error = None
    if (query[2] is None) != (gallery[2] is None):
        error = "camids are given for only one of query and gallery; give both, or None for both"
    for name, (size, *given) in (("query", query), ("gallery", gallery)):
        for what, values in zip(("pids", "camids"), given, strict=True):
            if values is None:
                continue
            values = torch.as_tensor(values)
            if values.is_floating_point() or values.shape != (size,):
                needed = f"{name} {what} must be integers, one for each of {size} features"
                error = error or f"{needed}, not {_described(values)}"
    distributed.raise_together(error)

    def tensor(values: Tensor, part: slice) -> Tensor:
        return torch.as_tensor(values)[part].to(device, torch.int64)

    everything = slice(None)
    part = everything if gallery_sharded else own_share(gallery[0])
    query_pids, gallery_pids = tensor(query[1], everything), tensor(gallery[1], part)
    _check_same_queries((f"{len(query_pids)} queries", f"sum of pids {int(query_pids.sum())}"))
    if query[2] is None or gallery[2] is None:
        cameras = torch.zeros_like(query_pids), torch.ones_like(gallery_pids)
        return NumberedLabels(query_pids, cameras[0], gallery_pids, cameras[1], query_pids[:0])
    query_camids, gallery_camids = tensor(query[2], everything), tensor(gallery[2], part)
    known = distributed.gather_objects(torch.cat([query_camids, gallery_camids]).unique().tolist())
    camids = torch.tensor(sorted(set().union(*known)), dtype=torch.int64, device=device)
    cameras = torch.searchsorted(camids, query_camids), torch.searchsorted(camids, gallery_camids)
    return NumberedLabels(query_pids, cameras[0], gallery_pids, cameras[1], camids)
