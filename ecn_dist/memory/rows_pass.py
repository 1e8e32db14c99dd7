"""One pass over the memory rows of a rank, in chunks: softmax sums, nearest rows, and the softmax-weighted sum of rows.

The similarities of a chunk live only until the next chunk, so working memory does not grow with the number of rows.
A running maximum keeps the exponentials finite; sums under a lower one are scaled down when a higher one is met
(Milakov and Gimelshein 2018, arXiv 1805.02867; FlashAttention, Dao et al. 2022). Similarities are dot products x . v;
the temperature divides them only inside the exponential, so that equal ones stay equal and rank in row order.

Shape letters: B batch rows of all ranks, M memory rows here, D feature length, C rows of a chunk, k neighbours.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Columns under one maximum when the largest of a chunk are sought: the sort sees a chunk's C / 32 maxima and the 32 k
# columns under the k best of them, in place of all C columns.
GROUP = 32


@dataclass
class RowsSummary:
    """What a loss and its gradient need of a set of rows. Where fewer than k: free places last, with -inf and M."""

    maximum_B: Tensor  # the largest similarity x . v
    normalizer_B: Tensor  # sum over rows of exp((x . v - maximum) / temperature)
    weighted_sum_BD: Tensor  # sum over rows of exp((x . v - maximum) / temperature) v
    top_similarity_Bk: Tensor  # the k largest similarities, descending, equals by the lower row number
    top_row_Bk: Tensor  # their row numbers among these rows, int64

    @classmethod
    def of_no_rows(cls, features_BD: Tensor, rows_MD: Tensor, num_neighbors: int) -> "RowsSummary":
        """To begin with: maximum -inf, sums zero."""
        (batch, dim), dtype = features_BD.shape, accumulation_dtype(features_BD, rows_MD)
        infinity = torch.full((batch, 1 + num_neighbors), -torch.inf, dtype=dtype, device=rows_MD.device)
        sums = torch.zeros(batch, dtype=dtype, device=rows_MD.device), infinity.new_zeros(batch, dim)
        row_Bk = torch.full((batch, num_neighbors), len(rows_MD), device=rows_MD.device)
        return cls(infinity[:, 0], *sums, infinity[:, 1:], row_Bk)

    def raise_maximum(self, chunk_maximum_B: Tensor, temperature: float) -> None:
        """Bring maximum and sums to the maximum of the rows so far and of a chunk."""
        maximum_B = torch.maximum(self.maximum_B, chunk_maximum_B)
        rescale_B = torch.exp((self.maximum_B - maximum_B) / temperature)
        self.maximum_B = maximum_B
        self.normalizer_B.mul_(rescale_B)
        self.weighted_sum_BD.mul_(rescale_B.unsqueeze(1))

    def add_nearest(self, similarity_Bn: Tensor, row_Bn: Tensor) -> None:
        """Keep the k nearest of the rows so far and of later ones, given in row order."""
        similarity_Bn = torch.cat([self.top_similarity_Bk, similarity_Bn], dim=1)
        row_Bn = torch.cat([self.top_row_Bk, row_Bn], dim=1)
        self.top_similarity_Bk, self.top_row_Bk = keep_largest(similarity_Bn, row_Bn, self.top_row_Bk.shape[1])


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of `tensors` is, else float32: sums are never kept in half precision."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def first_largest(values: Tensor, count: int) -> Tensor:
    """(B, n) -> (B, min(count, n)): the columns of the largest values, descending, equals by the lower column."""
    count = min(count, values.shape[1])
    if not count:
        return values.new_empty((len(values), 0), dtype=torch.int64)
    # topk leaves open which of several equals it takes, and a stable sort costs several times as much; so one topk
    # finds the last value taken, and a second one the first columns that have it.
    last_value_B1 = torch.topk(values, count, dim=1).values[:, -1:]
    order = torch.arange(0, -values.shape[1], -1, dtype=values.dtype, device=values.device)
    wanted = torch.where(values == last_value_B1, order, -torch.inf).masked_fill_(values > last_value_B1, torch.inf)
    columns = torch.topk(wanted, count, dim=1).indices.sort(dim=1).values
    return columns.gather(1, torch.sort(values.gather(1, columns), dim=1, descending=True, stable=True).indices)


def keep_largest(values: Tensor, numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, n) -> (B, min(count, n)): the largest values in the order of `first_largest`, and the numbers beside them."""
    best = first_largest(values, count)
    return values.gather(1, best), numbers.gather(1, best)


def default_chunk_bytes(device: torch.device) -> int:
    """On the CPU a chunk that stays in the cache, on an accelerator one beside which starting kernels costs little."""
    return 2**24 if device.type == "cpu" else 2**30


def rows_per_chunk(chunk_bytes: int, batch: int, rows_MD: Tensor, dtype: torch.dtype) -> int:
    """C such that a chunk touches about `chunk_bytes`: its rows, the rows widened to `dtype`, and its similarities."""
    num_rows, dim = rows_MD.shape
    widened_bytes = dim * dtype.itemsize if _must_widen(rows_MD, dtype) else 0
    row_bytes = dim * rows_MD.itemsize + widened_bytes + batch * dtype.itemsize
    return GROUP * max(1, min(chunk_bytes // (GROUP * row_bytes), -(-num_rows // GROUP)))


def _must_widen(rows_MD: Tensor, dtype: torch.dtype) -> bool:
    """Only CUDA has products that take half precision and give float32."""
    return rows_MD.dtype != dtype and rows_MD.device.type != "cuda"


def summarize_rows(
    features_BD: Tensor,
    rows_MD: Tensor,
    *,
    temperature: float,
    num_neighbors: int,
    chunk_bytes: int,
    left_out: tuple[Tensor, Tensor] | None = None,
) -> RowsSummary:
    """Summarise `rows_MD` as seen by each of `features_BD`, in one pass with two matrix products a chunk.

    `left_out` is (M,) booleans, rows that take no part, and (B,) row numbers, of one row for each feature that takes no
    part for it (or of none). Where no row takes part the maximum is the type's lowest number. Half-precision rows are
    widened chunk by chunk on the CPU; on CUDA the products take them as they are (features and softmax weights are
    rounded to their type). No host synchronisation.
    """
    num_rows, dtype = len(rows_MD), accumulation_dtype(features_BD, rows_MD)
    widen = _must_widen(rows_MD, dtype)
    mixed: dict[str, Any] = {"out_dtype": dtype} if rows_MD.dtype != dtype and not widen else {}
    queries_BD = features_BD.to(rows_MD.dtype if mixed else dtype)
    chunk_rows = rows_per_chunk(chunk_bytes, len(features_BD), rows_MD, dtype)
    similarity_BC = torch.empty(len(features_BD), chunk_rows, dtype=dtype, device=rows_MD.device)
    widened_CD = similarity_BC.new_empty(chunk_rows, rows_MD.shape[1]) if widen else None
    summary = RowsSummary.of_no_rows(features_BD, rows_MD, num_neighbors)

    for first_row in range(0, num_rows, chunk_rows):
        chunk_cD = rows_MD[first_row : first_row + chunk_rows]
        count = len(chunk_cD)
        if widened_CD is not None:
            chunk_cD = widened_CD[:count].copy_(chunk_cD)
        similarity_Bc = similarity_BC[:, :count]
        similarity_BC[:, count:] = -torch.inf  # the last chunk may be shorter
        torch.mm(queries_BD, chunk_cD.t(), **mixed, out=similarity_Bc)
        if left_out is not None:
            similarity_Bc.masked_fill_(left_out[0][first_row : first_row + count], -torch.inf)
            column_B1 = (left_out[1] - first_row).unsqueeze(1)
            is_here_B1, column_B1 = (column_B1 >= 0) & (column_B1 < count), column_B1.clamp(0, count - 1)
            kept_B1 = similarity_Bc.gather(1, column_B1).masked_fill_(is_here_B1, -torch.inf)
            similarity_Bc.scatter_(1, column_B1, kept_B1)

        maximum_BG = similarity_BC.unflatten(1, (-1, GROUP)).amax(dim=2) if num_neighbors else similarity_BC
        chunk_maximum_B = maximum_BG.amax(dim=1)
        if num_neighbors:
            # The k best columns lie in the k first groups by (maximum descending, position): whatever lies in another
            # group has a column before it in each of those.
            groups_Bk = first_largest(maximum_BG, num_neighbors).sort(dim=1).values
            column_Bn = (groups_Bk.unsqueeze(2) * GROUP + torch.arange(GROUP, device=rows_MD.device)).flatten(1)
            summary.add_nearest(similarity_BC.gather(1, column_Bn), column_Bn + first_row)

        if left_out is not None:  # the difference of two infinities would be no number
            chunk_maximum_B = chunk_maximum_B.clamp(min=torch.finfo(dtype).min)
        summary.raise_maximum(chunk_maximum_B, temperature)
        weight_Bc = similarity_Bc.sub_(summary.maximum_B.unsqueeze(1)).mul_(1.0 / temperature).exp_()
        summary.normalizer_B.add_(weight_Bc.sum(dim=1))
        weight_Bc = weight_Bc.to(chunk_cD.dtype)
        summary.weighted_sum_BD = torch.addmm(summary.weighted_sum_BD, weight_Bc, chunk_cD, **mixed)

    summary.top_row_Bk.clamp_(max=num_rows)
    return summary
