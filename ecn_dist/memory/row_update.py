"""The update of memory rows (METHOD.md: Memory update), repeated indices in batch order.

Shape letters: B batch rows of all ranks, M memory rows here, D feature length.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ecn_dist.memory.exemplar_memory import ExemplarMemory

# Significant binary digits, the leading one included, and the exponent (of `frexp`) under which the spacing of numbers
# stays that of the smallest.
_DIGITS = {torch.bfloat16: (8, -125), torch.float16: (11, -13)}


def update_rows_(
    memory: "ExemplarMemory",
    features_BD: Tensor,
    row_B: Tensor,
    occurrence_B: Tensor,
    *,
    rounds: int,
    momentum: float,
    accept: Tensor,
) -> None:
    """v_y <- normalised(m v_y + (1 - m) x_i), for each batch row i in order whose row y this rank holds. In place.

    The first occurrences of all rows are applied at once, then the second ones, and so on. A row that comes out as zero
    stays zero. Half-precision rows are rounded by `round_stochastically`. No host synchronisation.

    Args:
        memory: Whose `rows` and `written` change.
        features_BD: x, in the type that sums are kept in.
        row_B: y, global numbers.
        occurrence_B: `occurrence_number` of the batch.
        rounds: So many occurrences of a row are applied.
        momentum: m.
        accept: A boolean scalar tensor; where false nothing changes.
    """
    rows_MD, written_M, step = memory.rows, memory.written, memory.num_updates
    if not len(rows_MD):
        return
    noise_BD = None
    if rows_MD.dtype in _DIGITS:
        # Drawn for the whole batch from the step alone, so that any number of ranks rounds alike.
        generator = torch.Generator(device=rows_MD.device).manual_seed(step)
        noise_BD = torch.rand(features_BD.shape, generator=generator, device=rows_MD.device)
    is_here_B, local_B = memory.locate(row_B)
    batch_rows_B = torch.arange(len(local_B), device=local_B.device)
    for occurrence in range(rounds):
        old_BD = rows_MD[local_B]
        new_BD = torch.nn.functional.normalize(torch.lerp(features_BD, old_BD.to(features_BD.dtype), momentum), dim=1)
        if noise_BD is not None:
            new_BD = round_stochastically(new_BD, rows_MD.dtype, noise_BD)
        is_now_B = is_here_B & (occurrence_B == occurrence)
        is_taken_B = is_now_B & accept
        new_BD = torch.where(is_taken_B.unsqueeze(1), new_BD.to(rows_MD.dtype), old_BD)
        new_written_B = torch.where(is_taken_B, step, written_M[local_B])
        # A fixed number of writes, so that the host need not know how many there are: batch rows that have nothing to
        # write repeat the write of one that has (or, where none has, leave one row as it is).
        writer_B = torch.where(is_now_B, batch_rows_B, is_now_B.byte().argmax())
        rows_MD.index_copy_(0, local_B[writer_B], new_BD[writer_B])
        written_M.index_copy_(0, local_B[writer_B], new_written_B[writer_B])


def occurrence_number(values_B: Tensor, key_B: Tensor | None = None) -> Tensor:
    """How many equal values come before each of `values_B`: 0 for a first occurrence, 1 for a second, ...

    With `key_B`, "before" means: with a smaller key, or with an equal one and in an earlier place.
    """
    position_B = torch.arange(len(values_B), device=values_B.device)
    by_key_B = position_B if key_B is None else torch.argsort(key_B, stable=True)
    order_B = by_key_B[torch.argsort(values_B[by_key_B], stable=True)]
    sorted_B = values_B[order_B]
    first_of_run_B = torch.searchsorted(sorted_B, sorted_B)
    return torch.empty_like(position_B).scatter_(0, order_B, position_B - first_of_run_B)


def round_stochastically(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round `values` to one of the two neighbouring numbers of half-precision `dtype`, up with the probability of the
    distance passed, so that the mean over many roundings is exact and small steps are not lost. `noise` in [0, 1).
    """
    digits, least_exponent = _DIGITS[dtype]
    exponent = torch.frexp(values).exponent.clamp_(min=least_exponent)
    spacing = torch.ldexp(torch.ones_like(values), exponent - digits)
    return (torch.floor(values / spacing + noise) * spacing).to(dtype)
