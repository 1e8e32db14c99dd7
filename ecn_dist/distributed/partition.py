"""Who owns which of N rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowPartition:
    """N rows in W contiguous parts of ceil(N / W); the last parts may be shorter, or empty.

    `torch.chunk` and DTensor's `Shard(0)` cut alike, so any number of ranks can read a checkpoint.
    """

    num_rows: int
    world_size: int

    @property
    def rows_per_rank(self) -> int:
        return -(-self.num_rows // self.world_size)

    def start(self, rank: int) -> int:
        """The first row of `rank`."""
        return min(rank * self.rows_per_rank, self.num_rows)

    def stop(self, rank: int) -> int:
        """One past the last row of `rank`."""
        return min((rank + 1) * self.rows_per_rank, self.num_rows)

    def size(self, rank: int) -> int:
        """How many rows `rank` owns."""
        return self.stop(rank) - self.start(rank)
