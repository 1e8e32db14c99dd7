"""The sparse codes of all pictures, from their features: neighbours, mutual neighbourhoods, weights, averages.

Letters: N pictures, n of them on this rank, k neighbours, E entries.
"""

from dataclasses import replace
from zlib import crc32

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.clustering.neighbors import Neighbors, Ranking, distance, nearest
from ecn_dist.clustering.pictures import Pictures
from ecn_dist.errors import UserError
from ecn_dist.ranking import reciprocal
from ecn_dist.ranking.inputs import described


@torch.no_grad()
def make_codes(
    features: Tensor, rankings: list[Ranking], camids: Tensor | None, sharded: bool, memory_budget: int
) -> tuple[sparse.csr_array, slice]:
    """The codes (N, N) by `rankings`, one of all pictures, or two by `camids` (N,), and this rank's rows of them.

    The same on any number of ranks. Collectives: those of `Pictures`; gathers of neighbour lists (N, k) and codes.
    """
    pictures = Pictures(features, sharded, memory_budget)
    own, num_pictures = slice(pictures.first, pictures.first + len(pictures.own)), pictures.total
    # Of more than there are, all are near; memory is laid out for those that there are.
    rankings = [replace(r, k=min(r.k, num_pictures), head=min(r.head, num_pictures)) for r in rankings]
    cameras = None if camids is None else _check_camids(camids, num_pictures).to(pictures.own.device)
    found = nearest(pictures, rankings, cameras)
    lists = [distributed.all_gather_uneven_rows(numbers.to("cpu", torch.int32)).numpy() for _, numbers in found]
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
    coded = reciprocal.gather_rows(reciprocal.codes(members, _distances(pictures, members, found)))
    return reciprocal.gather_rows(reciprocal.averaged(first, coded)), own


def _check_camids(camids: Tensor, num_pictures: int) -> Tensor:
    """(N,) int64, the same on every rank. Collective."""
    camids, error = torch.as_tensor(camids), None
    if camids.is_floating_point() or camids.is_complex() or camids.shape != (num_pictures,):
        rule = f"integers, one for each of all {num_pictures} pictures on every rank"
        error = f"camids must be {rule}, not {described(camids)}"
    distributed.raise_together(error)
    camids = camids.to("cpu", torch.int64)
    if len(set(distributed.gather_objects(crc32(camids.numpy().tobytes())))) > 1:
        raise UserError("every rank must give the same camids of all pictures", on_all_ranks=True)
    return camids


def _distances(pictures: Pictures, members: sparse.csr_array, found: list[Neighbors]) -> np.ndarray:
    """(E,) distances from this rank's pictures to the entries of `members` (n, N), most of which are `found`."""
    known = sparse.csr_array(members.shape)
    for values, numbers in found:
        there = numbers >= 0
        place = there.nonzero()[:, 0].cpu().numpy(), numbers[there].cpu().numpy()
        known += sparse.csr_array((values[there].cpu().numpy() + 1.0, place), shape=members.shape)
    row = np.repeat(np.arange(members.shape[0]), np.diff(members.indptr))
    distances = reciprocal.values_at(known, row, members.indices) - 1.0
    new = np.flatnonzero(distances < 0)
    rows, columns = (torch.from_numpy(part[new].astype(np.int64)) for part in (row, members.indices))
    dots = pictures.dots(rows.to(pictures.own.device), columns.to(pictures.own.device))
    distances[new] = distance(dots).cpu().numpy()
    return distances
