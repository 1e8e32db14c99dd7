"""Figures that tell whether the memory is well. Diagnostics: nothing here reaches the loss or the rows.

Shape letters: b batch rows here, M memory rows here, N in all, k neighbours.
"""

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from ecn_dist import distributed

if TYPE_CHECKING:
    from ecn_dist.memory.exemplar_memory import ExemplarMemory


class MemoryHealth(TypedDict, total=False):
    """Only `own_similarity` and the neighbour figures may be missing: before a loss, without neighbours or ids."""

    rows_never_written: int
    mean_staleness: float  # updates since a row was last written, the mean over written rows; 0 just after
    steps_skipped: int  # steps on which some rank said skip
    steps_not_finite: int  # steps with a feature that was not finite on some rank
    own_similarity: float  # x_i . v_{y_i} in the latest loss, the mean over the global batch
    neighbor_precision: float  # of the latest neighbours, the own row left out, the share with the own row's pid
    neighbor_cross_camera: float  # of those with the same pid, the share from another camera


def measure_health(memory: "ExemplarMemory") -> MemoryHealth:
    """Collective: one all-reduce, of the same size on every rank whatever is known there."""
    written_M, latest, pids_N, camids_N = memory.written, memory.latest, memory.pids, memory.camids
    staleness_M = (memory.num_updates - 1 - written_M).masked_fill(written_M < 0, 0)
    sums: list[Tensor | float] = [len(written_M), (written_M >= 0).sum(), staleness_M.sum()]
    if latest is not None:
        sums += [len(latest.indices_b), latest.own_similarity_b.sum()]
        if pids_N is not None:
            indices_b1 = latest.indices_b.to(pids_N.device).unsqueeze(1)
            neighbors_bk = latest.neighbors_bk.to(pids_N.device)
            # A feature that is not finite has no neighbours: their numbers may then lie past the last row.
            is_other = (neighbors_bk != indices_b1) & (neighbors_bk < len(pids_N)) & (pids_N[indices_b1] >= 0)
            neighbors_bk = neighbors_bk.clamp(max=len(pids_N) - 1)
            same_pid = is_other & (pids_N[neighbors_bk] == pids_N[indices_b1])
            sums += [is_other.sum(), same_pid.sum()]
            if camids_N is not None:
                sums += [(same_pid & (camids_N[neighbors_bk] != camids_N[indices_b1])).sum()]
    packed = torch.tensor([float(value) for value in sums] + [0.0] * (8 - len(sums)), dtype=torch.float64)
    rows, written, staleness, seen, similarity, others, same, across = distributed.all_reduce(packed).tolist()

    skipped, not_finite = memory.refused.tolist()
    health = MemoryHealth(
        rows_never_written=int(rows - written),
        mean_staleness=staleness / max(written, 1.0),
        steps_skipped=skipped,
        steps_not_finite=not_finite,
    )
    if seen:
        health["own_similarity"] = similarity / seen
    if others:
        health["neighbor_precision"] = same / others
    if same and camids_N is not None:
        health["neighbor_cross_camera"] = across / same
    return health
