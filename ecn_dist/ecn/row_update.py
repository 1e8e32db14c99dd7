"""The update of memory rows (METHOD.md: Memory update), repeated indices in batch order.

Shape letters: B batch rows of all ranks, n of them to be applied here, M memory rows here, D feature length.
"""

import torch
from torch import Tensor

from ecn_dist.ecn.streaming import accumulation_dtype

# Significant binary digits, the leading one included, and the exponent (of `frexp`) under which the spacing of numbers
# stays that of the smallest.
_DIGITS = {torch.bfloat16: (8, -125), torch.float16: (11, -13)}


def update_rows_(
    rows_MD: Tensor,
    written_M: Tensor,
    features_BD: Tensor,
    local_B: Tensor,
    *,
    momentum: float,
    accept: Tensor,
    step: int,
) -> None:
    """v_y <- normalised(m v_y + (1 - m) x_i), for each batch row i in order whose row y is among these. In place.

    `local_B` numbers rows from this rank's first; others than 0..M-1 are somebody else's. `written_M` gets `step`
    where a row is written. With `accept` (a boolean scalar tensor) false nothing changes. A row that comes out as zero
    stays zero. Rounds: the first occurrences of all rows at once, then the second ones, ...; mostly there is one.
    """
    here_n = ((local_B >= 0) & (local_B < rows_MD.shape[0])).nonzero().squeeze(1)
    if not len(here_n):
        return
    dtype = accumulation_dtype(features_BD, rows_MD)
    noise_BD = None
    if rows_MD.dtype in _DIGITS:
        # Drawn for the whole batch from the step alone, so that any number of ranks rounds alike.
        generator = torch.Generator(device=rows_MD.device).manual_seed(step)
        noise_BD = torch.rand(features_BD.shape, generator=generator, device=rows_MD.device)
    occurrence_n = occurrence_number(local_B[here_n])
    for occurrence in range(int(occurrence_n.max()) + 1):
        batch_row_n = here_n[occurrence_n == occurrence]
        local_n = local_B[batch_row_n]
        old_nD = rows_MD[local_n]
        new_nD = torch.lerp(features_BD[batch_row_n].to(dtype), old_nD.to(dtype), momentum)
        new_nD = torch.nn.functional.normalize(new_nD, dim=1)
        if noise_BD is not None:
            new_nD = round_stochastically(new_nD, rows_MD.dtype, noise_BD[batch_row_n])
        rows_MD[local_n] = torch.where(accept, new_nD.to(rows_MD.dtype), old_nD)
        written_M[local_n] = torch.where(accept, step, written_M[local_n])


def occurrence_number(values_n: Tensor) -> Tensor:
    """How many equal values come before each of `values_n`: 0 for a first occurrence, 1 for a second, ..."""
    order_n = torch.argsort(values_n, stable=True)
    sorted_n = values_n[order_n]
    position_n = torch.arange(len(values_n), device=values_n.device)
    first_of_run_n = torch.searchsorted(sorted_n, sorted_n)
    return torch.empty_like(position_n).scatter_(0, order_n, position_n - first_of_run_n)


def round_stochastically(values: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round `values` to one of the two neighbouring numbers of half-precision `dtype`, up with the probability of the
    distance passed, so that the mean over many roundings is exact and small steps are not lost. `noise` in [0, 1).
    """
    digits, least_exponent = _DIGITS[dtype]
    exponent = torch.frexp(values).exponent.clamp_(min=least_exponent)
    spacing = torch.ldexp(torch.ones_like(values), exponent - digits)
    return (torch.floor(values / spacing + noise) * spacing).to(dtype)
