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
class Neighborhoods:
    """How neighbourhoods are made; see `find_clusters`."""

    k1: int
    k2: int
    k1_intra: int
    k1_inter: int
    k2_intra: int
    k2_inter: int

    def __post_init__(self) -> None:
        for k1, k2, most in (("k1", "k2", self.k1), ("k1_intra", "k2_intra", self.k1_intra + 1)):
            if getattr(self, k1) < 1 or not 1 <= getattr(self, k2) <= most:
                given = f"{k1} {getattr(self, k1)}, {k2} {getattr(self, k2)}"
                raise UserError(f"{given}: {k1} must be at least 1, and {k2} between 1 and {most}", on_all_ranks=True)
        if self.k1_inter < 1 or not 0 <= self.k2_inter <= self.k1_inter:
            raise UserError(
                f"k1_inter {self.k1_inter}, k2_inter {self.k2_inter}: k1_inter must be at least 1, and k2_inter "
                "between 0 and k1_inter",
                on_all_ranks=True,
            )


@dataclass(frozen=True)
class Codes:
    """The codes of all pictures, and of this rank's."""

    all: sparse.csr_array  # (N, N)
    own: sparse.csr_array  # (n, N)
    first: int  # number of this rank's first picture


def make_codes(pictures: Pictures, settings: Neighborhoods, camids: Tensor | None, memory_budget: int) -> Codes:
    """The codes by `settings`: camera-aware if there are `camids` (N,). The same on any number of ranks.

    Collectives: those of `nearest` and `Pictures.dots`; gathers of neighbour lists (N, k) and codes.
    """
    own, num_pictures = slice(pictures.first, pictures.first + len(pictures.own)), pictures.total
    if camids is None:
        found = nearest(pictures, [Ranking(settings.k1)], None, memory_budget)
        (lists,) = (_gather_numbers(one) for one in found)
        half = reciprocal.neighbor_lists(lists, num_pictures, round(settings.k1 / 2) + 1)
        mutual = reciprocal.mutual(reciprocal.neighbor_lists(lists, num_pictures))
        members = reciprocal.expanded(mutual[own], reciprocal.mutual(half))
        first = reciprocal.neighbor_lists(lists[own], num_pictures, settings.k2)
    else:
        cameras = _check_camids(camids, num_pictures).to(pictures.own.device)
        rankings = [Ranking(settings.k1_intra + 1, "same"), Ranking(settings.k1_inter, "others")]
        found = nearest(pictures, rankings, cameras, memory_budget)
        intra, inter = (_gather_numbers(one) for one in found)
        same, others = (reciprocal.mutual(reciprocal.neighbor_lists(lists, num_pictures)) for lists in (intra, inter))
        members = same[own] + others[own]
        first = reciprocal.neighbor_lists(intra[own], num_pictures, settings.k2_intra)
        first += reciprocal.neighbor_lists(inter[own], num_pictures, settings.k2_inter)
    members.sort_indices()
    coded = reciprocal.codes(members, _distances(pictures, members, found, memory_budget))
    coded = reciprocal.gather_rows(reciprocal.averaged(first, reciprocal.gather_rows(coded)))
    return Codes(coded, coded[own], pictures.first)


def _gather_numbers(found: Neighbors) -> np.ndarray:
    """(N, k) int32 of all ranks. Collective."""
    return distributed.all_gather_uneven_rows(found.numbers.to("cpu", torch.int32)).numpy()


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
    places = (torch.from_numpy(part[new].astype(np.int64)).to(pictures.own.device) for part in (row, members.indices))
    dots = pictures.dots(*places, chunk_size(pictures.dim, memory_budget))
    distances[new] = (2.0 - 2.0 * dots).clamp_min(0.0).cpu().numpy()
    return distances
