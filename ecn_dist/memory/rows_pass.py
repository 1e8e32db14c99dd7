"""One pass over the memory rows of a rank, in chunks: softmax sums, nearest rows, and the softmax-weighted sum of rows.

The similarities of a chunk live only until the next chunk, so working memory does not grow with the number of rows.
A running maximum keeps the exponentials finite; what was accumulated under an older, lower maximum is scaled down when
a higher one is met (Milakov and Gimelshein 2018, arXiv 1805.02867; with the weighted sum as in FlashAttention, Dao et
al. 2022). Similarities here are plain dot products x . v; the temperature divides them only inside the exponential, so
that equal dot products stay equal and rank in row order.

Shape letters: B batch rows of all ranks, M memory rows here, D feature length, C rows of a chunk, k neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns under one maximum when the largest of a chunk are sought: the sort sees a chunk's C / 32 maxima and the 32 k
# columns under the k best of them, in place of all C columns.
GROUP = 32


@dataclass
class RowsSummary:
    """What the loss and its gradient need to know of a set of memory rows.

    Without rows: maximum -inf, sums zero. Where there are fewer than k rows, the free places come last, with similarity
    -inf and row number M.
    """

    maximum_B: Tensor  # the largest similarity x . v
    normalizer_B: Tensor  # sum over rows of exp((x . v - maximum) / temperature)
    weighted_sum_BD: Tensor  # sum over rows of exp((x . v - maximum) / temperature) v
    top_similarity_Bk: Tensor  # the k largest similarities, descending, equals by the lower row number
    top_row_Bk: Tensor  # their row numbers among these rows, int64


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of `tensors` is, else float32: sums are never kept in half precision."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def first_largest(values: Tensor, count: int) -> Tensor:
    """(B, n) -> (B, min(count, n)): the columns of the largest values, descending, equals by the lower column.

    `torch.topk` leaves open which of several equals it takes, and a stable sort of all columns costs several times as
    much; so one topk finds the last value taken, and a second one the first columns that have it.
    """
    count = min(count, values.shape[1])
    if not count:
        return values.new_empty((len(values), 0), dtype=torch.int64)
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
    """On the CPU little enough that the second product finds a chunk in the cache, on an accelerator so much that
    starting the kernels takes little of the time."""
    return 2**24 if device.type == "cpu" else 2**30


def rows_per_chunk(chunk_bytes: int, batch: int, rows_MD: Tensor, dtype: torch.dtype) -> int:
    """C such that a chunk touches about `chunk_bytes`: its rows, the rows widened to `dtype`, and its similarities."""
    num_rows, dim = rows_MD.shape
    row_bytes = dim * rows_MD.itemsize + batch * dtype.itemsize
    if _must_widen(rows_MD, dtype):
        row_bytes += dim * dtype.itemsize
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

    `left_out` is (M,) booleans, rows that take no part, and (B,) row numbers, one for each feature that takes no part
    for it (a number that is no row's: none does). Where no row takes part the maximum is the type's lowest number.

    Rows may be float64, float32, bfloat16 or float16. Sums are in `accumulation_dtype`. Half-precision rows are
    widened chunk by chunk on the CPU; on CUDA the products take them as they are (features and softmax weights are
    rounded to the rows' type) and give float32. No host synchronisation, no collectives.
    """
    (batch, dim), num_rows = features_BD.shape, rows_MD.shape[0]
    dtype = accumulation_dtype(features_BD, rows_MD)
    widen = _must_widen(rows_MD, dtype)
    mixed = rows_MD.dtype != dtype and not widen
    queries_BD = features_BD.to(rows_MD.dtype if mixed else dtype)
    chunk_rows = rows_per_chunk(chunk_bytes, batch, rows_MD, dtype)

    def new_full(shape: tuple[int, ...], value: float, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=rows_MD.device)

    similarity_BC = new_full((batch, chunk_rows), 0.0)
    widened_CD = new_full((chunk_rows, dim), 0.0) if widen else None
    maximum_B1 = new_full((batch, 1), -torch.inf)
    normalizer_B1 = new_full((batch, 1), 0.0)
    weighted_sum_BD = new_full((batch, dim), 0.0)
    top_similarity_Bk = new_full((batch, num_neighbors), -torch.inf)
    top_row_Bk = new_full((batch, num_neighbors), num_rows, torch.int64)

    for first_row in range(0, num_rows, chunk_rows):
        chunk_cD = rows_MD[first_row : first_row + chunk_rows]
        count = chunk_cD.shape[0]
        if widened_CD is not None:
            chunk_cD = widened_CD[:count].copy_(chunk_cD)
        similarity_Bc = similarity_BC[:, :count]
        similarity_BC[:, count:] = -torch.inf  # the last chunk may be shorter
        if mixed:
            torch.mm(queries_BD, chunk_cD.t(), out_dtype=dtype, out=similarity_Bc)
        else:
            torch.mm(queries_BD, chunk_cD.t(), out=similarity_Bc)
        if left_out is not None:
            similarity_Bc.masked_fill_(left_out[0][first_row : first_row + count], -torch.inf)
            column_B1 = (left_out[1] - first_row).unsqueeze(1)
            is_here_B1, column_B1 = (column_B1 >= 0) & (column_B1 < count), column_B1.clamp(0, count - 1)
            kept_B1 = similarity_Bc.gather(1, column_B1).masked_fill_(is_here_B1, -torch.inf)
            similarity_Bc.scatter_(1, column_B1, kept_B1)

        if num_neighbors:
            group_maximum_BG = similarity_BC.unflatten(1, (-1, GROUP)).amax(dim=2)
            chunk_maximum_B1 = group_maximum_BG.amax(dim=1, keepdim=True)
            # The k best columns lie in the k first groups by (maximum descending, position): whatever lies in another
            # group has a column before it in each of those. All rows of the chunk come later than those so far.
            groups_Bk = first_largest(group_maximum_BG, num_neighbors).sort(dim=1).values
            column_Bn = (groups_Bk.unsqueeze(2) * GROUP + torch.arange(GROUP, device=rows_MD.device)).flatten(1)
            candidates_Bn = torch.cat([top_similarity_Bk, similarity_BC.gather(1, column_Bn)], dim=1)
            candidate_rows_Bn = torch.cat([top_row_Bk, column_Bn + first_row], dim=1)
            top_similarity_Bk, top_row_Bk = keep_largest(candidates_Bn, candidate_rows_Bn, num_neighbors)
        else:
            chunk_maximum_B1 = similarity_BC.amax(dim=1, keepdim=True)

        if left_out is not None:  # the difference of two infinities would be no number
            chunk_maximum_B1 = chunk_maximum_B1.clamp(min=torch.finfo(dtype).min)
        new_maximum_B1 = torch.maximum(maximum_B1, chunk_maximum_B1)
        rescale_B1 = torch.exp((maximum_B1 - new_maximum_B1) / temperature)
        maximum_B1 = new_maximum_B1
        weight_Bc = similarity_Bc.sub_(maximum_B1).mul_(1.0 / temperature).exp_()
        normalizer_B1.mul_(rescale_B1).add_(weight_Bc.sum(dim=1, keepdim=True))
        weighted_sum_BD.mul_(rescale_B1)
        if mixed:
            weighted_sum_BD = torch.addmm(weighted_sum_BD, weight_Bc.to(rows_MD.dtype), chunk_cD, out_dtype=dtype)
        else:
            weighted_sum_BD.addmm_(weight_Bc, chunk_cD)

    return RowsSummary(
        maximum_B1.squeeze(1),
        normalizer_B1.squeeze(1),
        weighted_sum_BD,
        top_similarity_Bk,
        top_row_Bk.clamp_(max=num_rows),
    )
