"""The sparse codes of all pictures, from their features: neighbours, mutual neighbourhoods, weights, averages.

Letters: N pictures, n of them on this rank, k neighbours, E entries.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.clustering.neighbors import Neighbors, Ranking, chunk_size, nearest
from ecn_dist.clustering.pictures import Pictures
from ecn_dist.errors import UserError
from ecn_dist.ranking import reciprocal


@dataclass(frozen=True)
class Codes:
    """The codes of all pictures, and of this rank's."""

    all: sparse.csr_array  # (N, N)
    own: sparse.csr_array  # (n, N)
    first: int  # number of this rank's first picture


def make_codes(pictures: Pictures, rankings: list[Ranking], camids: Tensor | None, memory_budget: int) -> Codes:
    """The codes by `rankings`, one of all pictures, or two by `camids` (N,). The same on any number of ranks.

    Collectives: those of `nearest` and `Pictures.dots`; gathers of neighbour lists (N, k) and codes.
    """
    own, num_pictures = slice(pictures.first, pictures.first + len(pictures.own)), pictures.total
    cameras = None if camids is None else _check_camids(camids, num_pictures).to(pictures.own.device)
    found = nearest(pictures, rankings, cameras, memory_budget)
    lists = [distributed.all_gather_uneven_rows(one.numbers.to("cpu", torch.int32)).numpy() for one in found]
    mutual = [reciprocal.mutual(reciprocal.neighbor_lists(numbers, num_pictures)) for numbers in lists]
    if camids is None:
        half = reciprocal.neighbor_lists(lists[0], num_pictures, round(rankings[0].k / 2) + 1)
        members = reciprocal.expanded(mutual[0][own], reciprocal.mutual(half))
    else:
        members = mutual[0][own] + mutual[1][own]
    first = sparse.csr_array(members.shape)
    for ranking, numbers in zip(rankings, lists, strict=True):
        first += reciprocal.neighbor_lists(numbers[own], num_pictures, ranking.head)
    members.sort_indices()
    coded = reciprocal.codes(members, _distances(pictures, members, found, memory_budget))
    coded = reciprocal.gather_rows(reciprocal.averaged(first, reciprocal.gather_rows(coded)))
    return Codes(coded, coded[own], pictures.first)


def _check_camids(camids: Tensor, num_pictures: int) -> Tensor:
    """(N,) int64, the same on every rank. Collective."""
    camids = torch.as_tensor(camids)
    error = None
    if camids.is_floating_point() or camids.is_complex() or camids.shape != (num_pictures,):
        found = f"{str(camids.dtype).removeprefix('torch.')} of shape {tuple(camids.shape)}"
        error = f"camids must be integers, one for each of all {num_pictures} pictures on every rank, not {found}"
    distributed.raise_together(error)
    camids = camids.to("cpu", torch.int64)
    if len(set(distributed.gather_objects(crc32(camids.numpy().tobytes())))) > 1:
        raise UserError("every rank must give the same camids of all pictures", on_all_ranks=True)
    return camids


def _distances(pictures: Pictures, members: sparse.csr_array, found: list[Neighbors], memory_budget: int) -> np.ndarray:
    """(E,) distances from this rank's pictures to the entries of `members` (n, N), most of which are `found`."""
    known = sparse.csr_array(members.shape)
    for one in found:
        there = one.numbers >= 0
        place = there.nonzero()[:, 0].cpu().numpy(), one.numbers[there].cpu().numpy()
        known += sparse.csr_array((one.distances[there].cpu().numpy() + 1.0, place), shape=members.shape)
    row = np.repeat(np.arange(members.shape[0]), np.diff(members.indptr))
    distances = reciprocal.values_at(known, row, members.indices) - 1.0
    new = np.flatnonzero(distances < 0)
    rows, numbers = (torch.from_numpy(part[new].astype(np.int64)) for part in (row, members.indices))
    rows, numbers = rows.to(pictures.own.device), numbers.to(pictures.own.device)
    dots = pictures.dots(rows, numbers, chunk_size(pictures.dim, memory_budget))
    distances[new] = (2.0 - 2.0 * dots).clamp_min(0.0).cpu().numpy()
    return distances
