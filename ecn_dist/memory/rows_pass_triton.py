# mypy: disallow-untyped-defs=False
"""`summarize_rows` for half-precision rows on an accelerator, as two Triton kernels a chunk.

The similarity kernel keeps a tile of similarities in registers and leaves only its softmax weights (relative to the
tile's own maximum, in the rows' type), that maximum, their sum and the tile's k best columns; the sum kernel brings the
weights to one maximum as it loads them. Rows are read once by each: docs/scaling.md says why not once in all.

Shape letters: B batch rows, M memory rows here, D feature length, T tiles of a chunk, S splits of the sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecn_dist.memory.rows_pass import RowsSummary

TILE_ROWS = 128
DIM_STEP = 64  # D must divide by it
SUM_DIMS = 128
PROGRAMS = 256  # of the sum kernel, about: the chunk is split for it among so many


@triton.jit
def similarity_kernel(
    features, rows, weight, tile_maximum, tile_sum, top_similarity, top_row,
    batch, num_rows, dim, num_tiles, inverse_temperature,
    NUM_NEIGHBORS: tl.constexpr, BLOCK_B: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of similarities, and what is needed of it."""
    tile = tl.program_id(1)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.arange(0, TILE)
    n = tile * TILE + column
    d = tl.arange(0, STEP)
    b_inside, n_inside = b < batch, n < num_rows

    similarity = tl.zeros((BLOCK_B, TILE), dtype=tl.float32)
    feature_at = features + b[:, None] * dim + d[None, :]
    row_at = rows + n.to(tl.int64)[:, None] * dim + d[None, :]
    for _ in range(0, dim, STEP):
        feature = tl.load(feature_at, mask=b_inside[:, None], other=0.0)
        row = tl.load(row_at, mask=n_inside[:, None], other=0.0)
        similarity = tl.dot(feature, tl.trans(row), similarity)
        feature_at += STEP
        row_at += STEP
    similarity = tl.where(n_inside[None, :], similarity, -float("inf"))

    maximum = tl.max(similarity, axis=1)
    exponential = tl.exp((similarity - maximum[:, None]) * inverse_temperature)
    at_tile = b * num_tiles + tile
    tl.store(tile_maximum + at_tile, maximum, mask=b_inside)
    tl.store(tile_sum + at_tile, tl.sum(exponential, axis=1), mask=b_inside)
    weight_at = weight + b.to(tl.int64)[:, None] * num_tiles * TILE + n[None, :]
    tl.store(weight_at, exponential.to(weight.dtype.element_ty), mask=b_inside[:, None])

    for place in range(NUM_NEIGHBORS):
        best, best_column = tl.max(similarity, axis=1, return_indices=True, return_indices_tie_break_left=True)
        best_row = tl.where(best > -float("inf"), tile * TILE + best_column, num_rows)
        at_place = at_tile * NUM_NEIGHBORS + place
        tl.store(top_similarity + at_place, best, mask=b_inside)
        tl.store(top_row + at_place, best_row, mask=b_inside)
        similarity = tl.where(column[None, :] == best_column[:, None], -float("inf"), similarity)


@triton.jit
def weighted_sum_kernel(
    weight, tile_scale, rows, partial,
    batch, num_rows, dim, num_tiles, tiles_per_split,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of one split of the tiles: sum of tile_scale times weight times row."""
    split = tl.program_id(2)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_inside, d_inside = b < batch, d < dim
    total = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, num_tiles)):
        n = tile * TILE + tl.arange(0, TILE)
        scale = tl.load(tile_scale + b * num_tiles + tile, mask=b_inside, other=0.0)
        weight_at = weight + b.to(tl.int64)[:, None] * num_tiles * TILE + n[None, :]
        scaled = tl.load(weight_at, mask=b_inside[:, None], other=0.0).to(tl.float32) * scale[:, None]
        row_at = rows + n.to(tl.int64)[:, None] * dim + d[None, :]
        row = tl.load(row_at, mask=(n < num_rows)[:, None] & d_inside[None, :], other=0.0)
        total = tl.dot(scaled.to(row.dtype), row, total)
    at = partial + (split * batch + b).to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(at, total, mask=b_inside[:, None] & d_inside[None, :])


def summarize_rows(
    features_BD: Tensor, rows_MD: Tensor, *, temperature: float, num_neighbors: int, chunk_bytes: int
) -> RowsSummary:
    """As `rows_pass.summarize_rows`, for bfloat16 or float16 rows with D a multiple of `DIM_STEP`."""
    (batch, dim), num_rows = features_BD.shape, rows_MD.shape[0]
    summary, device = RowsSummary.of_no_rows(features_BD, rows_MD, num_neighbors), rows_MD.device
    features_BD = features_BD.to(rows_MD.dtype).contiguous()
    block_b = min(128, max(16, triton.next_power_of_2(batch)))
    batch_blocks, dim_blocks = triton.cdiv(batch, block_b), triton.cdiv(dim, SUM_DIMS)
    row_bytes = (dim + batch) * rows_MD.itemsize
    chunk_rows = TILE_ROWS * max(1, min(chunk_bytes // (TILE_ROWS * row_bytes), triton.cdiv(num_rows, TILE_ROWS)))

    weight_BC = torch.empty((batch, chunk_rows), dtype=rows_MD.dtype, device=device)

    for first_row in range(0, num_rows, chunk_rows):
        chunk_cD = rows_MD[first_row : first_row + chunk_rows]
        count = chunk_cD.shape[0]
        num_tiles = triton.cdiv(count, TILE_ROWS)
        tile_maximum_BT = torch.empty((batch, num_tiles), dtype=torch.float32, device=device)
        tile_sum_BT = torch.empty_like(tile_maximum_BT)
        tile_top_similarity_Bn = torch.empty((batch, num_tiles * num_neighbors), dtype=torch.float32, device=device)
        tile_top_row_Bn = torch.empty((batch, num_tiles * num_neighbors), dtype=torch.int32, device=device)
        similarity_kernel[(batch_blocks, num_tiles)](
            features_BD, chunk_cD, weight_BC, tile_maximum_BT, tile_sum_BT, tile_top_similarity_Bn, tile_top_row_Bn,
            batch, count, dim, num_tiles, 1.0 / temperature,
            NUM_NEIGHBORS=num_neighbors, BLOCK_B=block_b, TILE=TILE_ROWS, STEP=DIM_STEP, num_warps=8, num_stages=3,
        )  # fmt: skip

        if num_neighbors:
            # Tiles follow each other and each has its best in order, so equals still stand in row order.
            row_Bn = torch.where(tile_top_row_Bn < count, tile_top_row_Bn.long() + first_row, num_rows)
            summary.add_nearest(tile_top_similarity_Bn, row_Bn)
        summary.raise_maximum(tile_maximum_BT.amax(dim=1), temperature)
        tile_scale_BT = torch.exp((tile_maximum_BT - summary.maximum_B.unsqueeze(1)) / temperature)
        summary.normalizer_B.add_((tile_sum_BT * tile_scale_BT).sum(dim=1))

        tiles_per_split = triton.cdiv(num_tiles * batch_blocks * dim_blocks, PROGRAMS)
        splits = triton.cdiv(num_tiles, tiles_per_split)
        partial_SBD = torch.empty((splits, batch, dim), dtype=torch.float32, device=device)
        weighted_sum_kernel[(batch_blocks, dim_blocks, splits)](
            weight_BC, tile_scale_BT, chunk_cD, partial_SBD,
            batch, count, dim, num_tiles, tiles_per_split,
            BLOCK_B=block_b, BLOCK_D=SUM_DIMS, TILE=TILE_ROWS, num_warps=8, num_stages=3,
        )  # fmt: skip
        summary.weighted_sum_BD.add_(partial_SBD.sum(dim=0))
    return summary
