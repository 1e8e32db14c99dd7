"""What a loader worker does: the pictures of one step, read, decoded and resized to one uint8 batch.

b pictures of this rank, H x W network input.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ecn_dist.data import transforms
from ecn_dist.data.draws import Draws
from ecn_dist.data.index import SplitIndex
from ecn_dist.data.jpeg import UnreadablePicture
from ecn_dist.data.plan import PassPlan
from ecn_dist.data.reader import ShardReader, decode
from ecn_dist.errors import UserError

NO_LABEL = -1
MAX_REPLACEMENTS = 16
FIRST_BUFFER_BYTES = 1 << 18  # of one decoded picture; grows with the pictures


class RawBatch(NamedTuple):
    """What a worker hands over. Only the pixels are a tensor: sharing a small array costs more than copying it."""

    pixels_bHW3: Tensor  # uint8
    samples_4b: np.ndarray  # int64: label, pid, camid, index
    boxes_b4: np.ndarray  # int64, (top, left, height, width) to erase
    error: str | None = None
    skipped: int = 0


class Batches(Dataset[RawBatch]):
    """Item t: one rank's pictures of step t. Outside of loader workers its pixels last until the next item is made.

    Fresh memory costs nearly as much as decoding (the system clears it page by page), so buffers serve again where
    that is safe.
    """

    def __init__(self, split: SplitIndex, height: int, width: int, reader: ShardReader) -> None:
        self.split = split
        self.height, self.width = height, width
        self.reader = reader
        self._buffer = np.empty(0, dtype=np.uint8)
        self._pixels = torch.empty(0, dtype=torch.uint8)

    def rows(self, step: int) -> np.ndarray:
        """(b,) the rows of the split's members in step t."""
        raise NotImplementedError

    def num_pictures(self, step: int) -> int:
        """b of step t."""
        raise NotImplementedError

    def pass_of(self, step: int) -> int:
        """How often the split was gone through before step t."""
        return 0

    def fill(self, step: int, batch: RawBatch) -> int:
        """Write the pictures of step t to `batch`; return how many were replaced."""
        raise NotImplementedError

    def failed(self, step: int, error: str) -> RawBatch:
        """A batch in the shape of step t's, with zeros for data."""
        batch = self._empty(step)
        batch.pixels_bHW3.zero_()
        return batch._replace(error=error)

    def __getitem__(self, step: int) -> RawBatch:
        batch = self._empty(step)
        try:
            return batch._replace(skipped=self.fill(step, batch))
        except UserError as error:
            return self.failed(step, str(error))

    def __getstate__(self) -> dict[str, Any]:
        """Without the buffers: a worker makes its own."""
        return self.__dict__ | {"_buffer": np.empty(0, dtype=np.uint8), "_pixels": torch.empty(0, dtype=torch.uint8)}

    def _empty(self, step: int) -> RawBatch:
        b = self.num_pictures(step)
        shape = (b, self.height, self.width, 3)
        if get_worker_info() is None:
            if self._pixels.numel() < math.prod(shape):
                self._pixels = torch.empty(shape, dtype=torch.uint8)
            pixels_bHW3 = self._pixels.view(-1)[: math.prod(shape)].view(shape)
        else:
            pixels_bHW3 = torch.empty(shape, dtype=torch.uint8)
        return RawBatch(pixels_bHW3, np.zeros((4, b), dtype=np.int64), np.zeros((b, 4), dtype=np.int64))

    def _decode(self, data: bytes) -> np.ndarray:
        """(h, w, 3) uint8, valid until the next call: memory used before is much cheaper than fresh pages."""
        if not self._buffer.size:
            self._buffer = picture_memory(FIRST_BUFFER_BYTES)
        pixels_hw3 = decode(data, self._buffer)
        if pixels_hw3.nbytes > self._buffer.nbytes:
            self._buffer = picture_memory(2 * pixels_hw3.nbytes)
        return pixels_hw3


class TrainBatches(Batches):
    """A rank's part of the planned global batches: t counts over all passes."""

    def __init__(
        self,
        split: SplitIndex,
        height: int,
        width: int,
        reader: ShardReader,
        *,
        plan: PassPlan,
        rank: int,
        world_size: int,
        random_erasing: float,
        camera_style: bool,
        labelled: bool,
        replace_bad: bool,
    ) -> None:
        super().__init__(split, height, width, reader)
        self.plan = plan
        self.rank, self.world_size = rank, world_size
        self.random_erasing = random_erasing
        self.camera_style = camera_style
        self.replace_bad = replace_bad
        self._draws = Draws(plan.seed, plan.domain, "augmentation")
        self._erase_draws = Draws(plan.seed, plan.domain, "erasing")
        identities = np.asarray(split.identities if labelled else (), dtype=np.int64)
        self._label_order = np.argsort(identities, kind="stable")
        self._sorted_identities = identities[self._label_order]

    def num_pictures(self, step: int) -> int:
        return self.plan.global_batch_size // self.world_size

    def rows(self, step: int) -> np.ndarray:
        pass_number, step_of_pass = divmod(step, self.plan.steps_per_pass)
        return self.plan.rows(pass_number, step_of_pass, self.rank, self.world_size)

    def pass_of(self, step: int) -> int:
        return step // self.plan.steps_per_pass

    def fill(self, step: int, batch: RawBatch) -> int:
        rows_b = self.rows(step)
        shown_b = rows_b.copy()
        pass_number = self.pass_of(step)
        erased: list[int] = []
        for place, (row, pixels_hw3, draws_K) in enumerate(self.pictures(rows_b, pass_number)):
            shown_b[place] = row
            draws = draws_K.tolist()  # plain floats: the arithmetic is scalar
            box = transforms.crop_box(draws, pixels_hw3.shape[0], pixels_hw3.shape[1])
            flip = draws[transforms.FLIP] < transforms.FLIP_PROBABILITY
            transforms.resize_into(batch.pixels_bHW3[place], pixels_hw3, box, flip)
            if draws[transforms.ERASE] < self.random_erasing:
                erased.append(place)
        members_b = np.asarray(self.split.members)[shown_b]
        erase_draws = self._erase_draws.uniforms(
            transforms.NUM_ERASE_DRAWS, (0, members_b["index"][erased], pass_number)
        )
        for place, draws in zip(erased, erase_draws.tolist(), strict=True):
            batch.boxes_b4[place] = transforms.erase_box(draws, self.height, self.width)
        batch.samples_4b[:] = self._labels(members_b["pid"]), members_b["pid"], members_b["camid"], members_b["index"]
        return int(np.count_nonzero(shown_b != rows_b))

    def pictures(
        self, rows_b: np.ndarray, pass_number: int, memory_b: Sequence[np.ndarray] | None = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The row, (h, w, 3) uint8 pixels and draws of each sample in turn; another row where one had to be replaced.

        The pixels are valid until the next are asked for, or lie in `memory_b` (flat uint8, large enough for each).
        """
        slots_b, draws_bK = self.choose(rows_b, pass_number)
        data_b = self.reader.read_batch(self.split, rows_b, slots_b)
        for at, (row, data) in enumerate(zip(rows_b.tolist(), data_b, strict=True)):
            try:
                picture = row, self._decode(data) if memory_b is None else decode(data, memory_b[at]), draws_bK[at]
            except UnreadablePicture as error:
                picture = self._replacement(row, int(slots_b[at]), pass_number, error)
            yield picture

    def choose(self, rows_b: np.ndarray, pass_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Which picture of each sample this pass shows, and the (b, NUM_DRAWS) draws that say how."""
        members_b = np.asarray(self.split.members)[rows_b]
        draws_bK = self._draws.uniforms(transforms.NUM_DRAWS, (0, members_b["index"], pass_number))
        real = self.split.num_cameras
        if not self.camera_style:
            return np.full(len(rows_b), real), draws_bK
        cameras_b = transforms.draw_camera(draws_bK, real)
        return np.where(cameras_b == members_b["camid"], real, cameras_b), draws_bK

    def _replacement(
        self, row: int, slot: int, pass_number: int, error: UnreadablePicture
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """The next sample in stored order that can be decoded: its row, pixels and draws."""
        if self.replace_bad:
            for further in range(1, MAX_REPLACEMENTS + 1):
                other_1 = np.array([(row + further) % len(self.split)])
                slot_1, draws_1K = self.choose(other_1, pass_number)
                try:
                    pixels_hw3 = self._decode(self.reader.read_batch(self.split, other_1, slot_1)[0])
                except UnreadablePicture:
                    continue
                return int(other_1[0]), pixels_hw3, draws_1K[0]
        raise self.reader.picture_error(self.split, row, slot, error) from error

    def _labels(self, pids_b: np.ndarray) -> np.ndarray:
        if not len(self._sorted_identities):
            return np.full(len(pids_b), NO_LABEL)
        return self._label_order[np.searchsorted(self._sorted_identities, pids_b)]


class EvaluationBatches(Batches):
    """Rows start .. stop - 1, in order, as they are."""

    def __init__(
        self, split: SplitIndex, height: int, width: int, reader: ShardReader, *, start: int, stop: int, batch_size: int
    ) -> None:
        super().__init__(split, height, width, reader)
        self.start, self.stop, self.batch_size = start, stop, batch_size

    def rows(self, step: int) -> np.ndarray:
        first = self.start + step * self.batch_size
        return np.arange(first, min(first + self.batch_size, self.stop))

    def num_pictures(self, step: int) -> int:
        return len(self.rows(step))

    def fill(self, step: int, batch: RawBatch) -> int:
        rows_b = self.rows(step)
        real = self.split.num_cameras
        data_b = self.reader.read_batch(self.split, rows_b, [real] * len(rows_b))
        for place, data in enumerate(data_b):
            try:
                transforms.resize_into(batch.pixels_bHW3[place], self._decode(data))
            except UnreadablePicture as error:
                raise self.reader.picture_error(self.split, int(rows_b[place]), real, error) from error
        members_b = np.asarray(self.split.members)[rows_b]
        batch.samples_4b[0] = NO_LABEL
        batch.samples_4b[1:] = members_b["pid"], members_b["camid"], members_b["index"]
        return 0


def picture_memory(num_bytes: int) -> np.ndarray:
    """Memory to decode into, on purpose not aligned to 32 bytes.

    libjpeg-turbo writes to aligned rows past the cache, which suits pictures that nobody reads soon; these are read at
    once, and reading them back from main memory would cost a fifth of decoding them.
    """
    memory = np.empty(num_bytes + 32, dtype=np.uint8)
    skipped = (16 - memory.ctypes.data) % 32
    return memory[skipped : skipped + num_bytes]
