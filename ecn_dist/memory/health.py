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
    """The figures of the rows, and of what the latest loss saw.

    Collective: one all-reduce, of the same size on every rank whatever is known there.
    """
    written_M, latest, pids_N, camids_N = memory.written, memory.latest, memory.pids, memory.camids
    is_written_M = written_M >= 0
    staleness_M = (memory.num_updates - 1 - written_M).masked_fill(~is_written_M, 0)
    sums: dict[str, Tensor | float] = {
        "rows": len(written_M),
        "written": is_written_M.sum(),
        "staleness": staleness_M.sum(),
        "features": 0,
        "similarity": 0.0,
        "neighbors": 0,
        "same_pid": 0,
        "cross_camera": 0,
    }
    if latest is not None:
        sums |= {"features": len(latest.indices_b), "similarity": latest.own_similarity_b.sum()}
        if pids_N is not None:
            indices_b1 = latest.indices_b.to(pids_N.device).unsqueeze(1)
            neighbors_bk = latest.neighbors_bk.to(pids_N.device)
            # A feature that is not finite has no neighbours: their numbers may then lie past the last row.
            is_other = (neighbors_bk != indices_b1) & (neighbors_bk < len(pids_N)) & (pids_N[indices_b1] >= 0)
            neighbors_bk = neighbors_bk.clamp(max=len(pids_N) - 1)
            same_pid = is_other & (pids_N[neighbors_bk] == pids_N[indices_b1])
            sums |= {"neighbors": is_other.sum(), "same_pid": same_pid.sum()}
            if camids_N is not None:
                sums["cross_camera"] = (same_pid & (camids_N[neighbors_bk] != camids_N[indices_b1])).sum()
    packed = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64)
    total = dict(zip(sums, distributed.all_reduce(packed).tolist(), strict=True))

    skipped, not_finite = memory.refused.tolist()
    health = MemoryHealth(
        rows_never_written=int(total["rows"] - total["written"]),
        mean_staleness=total["staleness"] / max(total["written"], 1.0),
        steps_skipped=skipped,
        steps_not_finite=not_finite,
    )
    if total["features"]:
        health["own_similarity"] = total["similarity"] / total["features"]
    if total["neighbors"]:
        health["neighbor_precision"] = total["same_pid"] / total["neighbors"]
    if total["same_pid"] and camids_N is not None:
        health["neighbor_cross_camera"] = total["cross_camera"] / total["same_pid"]
    return health
