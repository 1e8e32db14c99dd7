"""What is given to an evaluation, checked on all ranks together: features, and who is who.

Shape letters: Q queries, R queries of a block, G gallery pictures (from `Labels` on: of this rank), D feature length,
C cameras, P pairs.
"""

from collections.abc import Sequence

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
    error = None
    for name, features in (("gallery", gallery), ("query", query)):
        if features.ndim != 2 or not features.is_floating_point():
            error = f"{name} features must be floats of shape (pictures, length), not {described(features)}"
    if error is None and query.shape[1] != gallery.shape[1]:
        error = f"query features are {query.shape[1]} long and gallery features {gallery.shape[1]}"
    if error is None and len(query) == 0:
        error = "there are no queries"
    distributed.raise_together(error)
    _check_same_queries((f"{len(query)} queries", f"length {query.shape[1]}"))
    gallery = gallery if gallery_sharded else gallery[own_share(len(gallery))]
    if not distributed.any_rank(len(gallery) > 0):
        raise UserError("the gallery has no pictures", on_all_ranks=True)
    return query, gallery, first_of_part(len(gallery))


def own_share(size: int) -> slice:
    """This rank's rows of something that all ranks have."""
    partition, rank = RowPartition(size, distributed.world_size()), distributed.rank()
    return slice(partition.start(rank), partition.stop(rank))


def first_of_part(size: int) -> int:
    """The place of this rank's first row, where each rank has a part of `size` rows, in rank order. Collective."""
    return sum(distributed.gather_objects(size)[: distributed.rank()])


def described(values: Tensor) -> str:
    """Type and shape, for errors."""
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"


def _check_same_queries(facts: tuple[str, str]) -> None:
    given = distributed.gather_objects(facts)
    if len(set(given)) > 1:
        shown = "; ".join(f"rank {at}: {facts}" for at, facts in enumerate(given))
        raise UserError(f"every rank must give the same queries, but they differ: {shown}", on_all_ranks=True)


class Labels:
    """Who is who among the queries and this rank's gallery, on the device of computation.

    query_pids, query_cameras (Q,); gallery_pids, gallery_cameras (G,); camids (C,): the camids, ascending, whose places
    are the cameras' numbers on all ranks; num_true (Q,): pictures on all ranks with the query's pid and another camera.
    Without camids (None) all queries are of one camera and the gallery of another, so that nothing is junk.
    """

    def __init__(
        self, ids: Sequence[Tensor | None], sizes: tuple[int, int], gallery_sharded: bool, device: torch.device
    ) -> None:
        """Of the query pids and camids, and the gallery's, for features of these `sizes`, that this rank was given.

        What does not fit is a `UserError` on every rank. Collectives: gathers of errors and camids, a sum of (Q,).
        """
        error = None
        if (ids[1] is None) != (ids[3] is None):
            error = "camids are given for only one of query and gallery; give both, or None for both"
        given = []
        for place, what in enumerate(("query pids", "query camids", "gallery pids", "gallery camids")):
            values, size = ids[place], sizes[place // 2]
            values = torch.full((size,), place) if values is None else torch.as_tensor(values)
            if values.is_floating_point() or values.shape != (size,):
                rule = f"must be integers, one for each of {size} features"
                error = error or f"{what} {rule}, not {described(values)}"
            given.append(values)
        distributed.raise_together(error)
        own = slice(None) if gallery_sharded else own_share(sizes[1])
        self.query_pids, query_camids, *of_gallery = (values.to(device, torch.int64) for values in given)
        self.gallery_pids, gallery_camids = (values[own] for values in of_gallery)
        _check_same_queries((f"{sizes[0]} queries", f"sum of pids {int(self.query_pids.sum())}"))
        known = distributed.gather_objects(torch.cat([query_camids, gallery_camids]).unique().tolist())
        self.camids = torch.tensor(sorted(set().union(*known)), dtype=torch.int64, device=device)
        self.query_cameras = torch.searchsorted(self.camids, query_camids)
        self.gallery_cameras = torch.searchsorted(self.camids, gallery_camids)
        self._sorted_pids, self._order = torch.sort(self.gallery_pids, stable=True)
        # One key for each pair of pid and camera, so that the junk is counted by a search as well.
        known, pids = torch.unique(torch.cat([self.query_pids, self.gallery_pids]), return_inverse=True)
        keys = torch.cat([self.query_cameras, self.gallery_cameras]) * len(known) + pids
        same, junk = (_count_equal(*values.tensor_split([len(self.query_pids)])) for values in (pids, keys))
        self.num_true = distributed.all_reduce(same - junk)

    def count_different(self) -> Tensor:
        """(Q,) gallery pictures on all ranks with another pid than the query's. Collective."""
        return distributed.all_reduce(len(self.gallery_pids) - _count_equal(self.query_pids, self.gallery_pids))

    def same_pairs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs of one identity: places in `queries` (P,) ascending, and gallery rows of this rank (P,)."""
        pids = self.query_pids[queries]
        first = torch.searchsorted(self._sorted_pids, pids)
        count = torch.searchsorted(self._sorted_pids, pids, right=True) - first
        places = torch.repeat_interleave(count)
        return places, self._order[first[places] + place_in_row(places, count)]


def place_in_row(row: Tensor, count: Tensor) -> Tensor:
    """(P,) 0, 1, ... within each row, of ascending rows (P,) that come `count` (R,) times each."""
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]


def _count_equal(wanted: Tensor, values: Tensor) -> Tensor:
    values = values.sort().values
    return torch.searchsorted(values, wanted, right=True) - torch.searchsorted(values, wanted)
