"""What a loader worker does: the pictures of one step, read, decoded and resized to one batch of bytes.

b samples of this rank, V views of each, H x W network input, h x w stored picture, K random numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ecn_dist.data import transforms
from ecn_dist.data.cache import ShardCache
from ecn_dist.data.draws import Draws
from ecn_dist.data.index import SplitIndex
from ecn_dist.data.pictures import UnreadablePicture
from ecn_dist.data.plan import Step
from ecn_dist.data.reader import ShardReader, decode, picture_error
from ecn_dist.data.transforms import Augmentation
from ecn_dist.errors import UserError

ROW, BOX, NUM_FIELDS = 0, slice(4, 8), 8  # of a batch's int64 fields: row, pid, camid, index, and the erased box
FIELD_BYTES = 8 * NUM_FIELDS


class RawBatch(NamedTuple):
    """What a worker hands over: one tensor, so that one copy takes it to a device. See `fields_and_pixels`."""

    data: Tensor  # uint8
    error: str | None = None
    skipped: int = 0  # samples that stand in for others


def fields_and_pixels(data: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A batch's int64 fields (NUM_FIELDS, b V) and uint8 pixels (b V, H, W, 3), as views of its bytes."""
    pictures = data.numel() // (FIELD_BYTES + height * width * 3)
    fields = data[: FIELD_BYTES * pictures].view(torch.int64).view(NUM_FIELDS, pictures)
    return fields, data[FIELD_BYTES * pictures :].view(pictures, height, width, 3)


@dataclass(eq=False, repr=False)
class PictureDataset(Dataset[RawBatch]):
    """Item `step`: its batch. Outside of loader workers it lasts until the next one is made."""

    split: SplitIndex  # what the steps' rows count in
    height: int
    width: int
    style: str
    cache: ShardCache | None
    augmentation: Augmentation | None = None
    seed: int = 0  # of the random numbers, as `domain`
    domain: str = ""

    def __post_init__(self) -> None:
        self.reader = ShardReader(self.cache)
        self.views = self.split.num_cameras if self.style == "all" else 1
        self._draws = Draws(self.seed, self.domain, "augmentation")
        self._erase_draws = Draws(self.seed, self.domain, "erasing")
        # Of a batch and of a picture, kept: the system clears fresh memory page by page.
        self._memory, self._decoded = torch.empty(0, dtype=torch.uint8), np.empty(0, dtype=np.uint8)

    def open(self) -> ShardCache | None:
        """The cache of a URL's shards, where the rows are mapped from then on. `UserError` where it is too small."""
        cache = self.reader.cache_of(self.split)
        if cache and not isinstance(self.split.members, np.memmap):
            self.split = cache.mapped(self.split)
        return cache

    def batch_bytes(self, samples: int) -> int:
        return samples * self.views * (FIELD_BYTES + self.height * self.width * 3)

    def failed(self, samples: int, error: str) -> RawBatch:
        """A batch in full shape, with zeros for data."""
        return RawBatch(torch.zeros(self.batch_bytes(samples), dtype=torch.uint8), error)

    def __getitem__(self, step: Step) -> RawBatch:
        data = self._empty(len(step.rows_b))
        try:
            return RawBatch(data, None, self._fill(data, step))
        except UserError as error:
            return self.failed(len(step.rows_b), str(error))

    def _empty(self, samples: int) -> Tensor:
        size = self.batch_bytes(samples)
        if get_worker_info() is not None:  # its memory is shared with who trains
            return torch.empty(size, dtype=torch.uint8)
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]

    def _fill(self, data: Tensor, step: Step) -> int:
        """Write the pictures of a step; returns how many samples were replaced."""
        fields, pixels = fields_and_pixels(data, self.height, self.width)
        outs = pixels.unbind()  # all at once, as to slice them for each sample takes a while
        occurrences_b, number, V = step.occurrences_b, step.pass_number, self.views
        slots_bV, draws_bVK = self.choose(step.rows_b, occurrences_b, number)
        pictures = self.reader.read_batch(self.split, step.rows_b.repeat(V), slots_bV.ravel())
        shown_b, slots, draws = step.rows_b.copy(), slots_bV.tolist(), draws_bVK.tolist()  # one by one, lists are quick
        for at, row in enumerate(step.rows_b):
            views = slice(at * V, (at + 1) * V)
            error = self._show(outs[views], row, slots[at], draws[at], pictures[views])
            for stand_in in step.stand_ins[at] if error and step.stand_ins else ():
                slots_1V, draws_1VK = self.choose(stand_in[None], occurrences_b[at : at + 1], number)
                others = self.reader.read_batch(self.split, stand_in.repeat(V), slots_1V[0])
                if not self._show(outs[views], stand_in, slots_1V[0], draws_1VK[0].tolist(), others):
                    shown_b[at], draws_bVK[at], error = stand_in, draws_1VK[0], None
                    break
            if error:
                raise error
        fields_np, members_bV = fields.numpy(), np.asarray(self.split.members)[shown_b].repeat(V)
        fields_np[:4] = shown_b.repeat(V), *(members_bV[name] for name in ("pid", "camid", "index"))
        fields_np[BOX] = self._boxes(draws_bVK, members_bV["index"], step)
        return int(np.count_nonzero(shown_b != step.rows_b))

    def choose(self, rows_b: np.ndarray, occurrences_b: np.ndarray, pass_number: int) -> tuple[np.ndarray, np.ndarray]:
        """(b, V) which pictures of each sample are shown, and (b, V, K) the draws that say how."""
        members_b = np.asarray(self.split.members)[rows_b]
        own_b1 = members_b["camid"].astype(np.int64)[:, None]
        addresses = (self._views_of(occurrences_b), members_b["index"].repeat(self.views), pass_number)
        draws_bVK = self._draws.uniforms(transforms.NUM_DRAWS, addresses).reshape(len(rows_b), self.views, -1)
        real, chances_bV = self.split.num_cameras, draws_bVK[:, :, transforms.CAMERA]
        if self.style == "random":  # its own camera's: the real picture
            slots_bV = transforms.draw_camera(chances_bV, real)
            return np.where(slots_bV == own_b1, real, slots_bV), draws_bVK
        # Numbers of the other cameras; -1 is the real picture, which comes first of all.
        others_bV = np.arange(-1, self.views - 1)[None]
        if self.style == "other":
            others_bV = transforms.draw_camera(chances_bV, real - 1)
        return np.where(others_bV < 0, real, others_bV + (others_bV >= own_b1)), draws_bVK

    def _views_of(self, occurrences_b: np.ndarray) -> np.ndarray:
        """(b V,) the first number of the addresses: each view of each occurrence draws for itself."""
        return (occurrences_b[:, None] * self.views + np.arange(self.views)).ravel()

    def _show(
        self, outs_V: Sequence[Tensor], row: int, slots_V: Sequence[int], draws_VK: list[list[float]], data: list[bytes]
    ) -> UserError | None:
        """Decode and resize one sample's pictures; returns the error where one cannot be decoded."""
        for out_HW3, slot, draws_K, picture in zip(outs_V, slots_V, draws_VK, data, strict=True):
            try:
                pixels_hw3 = decode(picture, self._decoded)
            except UnreadablePicture as error:
                return picture_error(self.split, row, slot, error)
            if pixels_hw3.size > self._decoded.size:
                self._decoded = _picture_memory(2 * pixels_hw3.size)
            if self.augmentation is None:
                transforms.resize_into(out_HW3, pixels_hw3)
            else:
                transforms.augment_into(out_HW3, pixels_hw3, draws_K, self.augmentation)
        return None

    def _boxes(self, draws_bVK: np.ndarray, indices: np.ndarray, step: Step) -> np.ndarray:
        """(4, b V): what is erased of each picture; zeros for nothing."""
        boxes = np.zeros((len(indices), 4), dtype=np.int64)
        if self.augmentation is not None:
            chances = draws_bVK[:, :, transforms.ERASE].ravel()
            erased = np.flatnonzero(chances < self.augmentation.random_erasing)
            address = (self._views_of(step.occurrences_b)[erased], indices[erased], step.pass_number)
            draws = self._erase_draws.uniforms(transforms.NUM_ERASE_DRAWS, address).tolist()
            for at, row in zip(erased, draws, strict=True):
                boxes[at] = transforms.erase_box(row, self.height, self.width, self.augmentation)
        return boxes.T


def _picture_memory(num_bytes: int) -> np.ndarray:
    """Memory to decode into, on purpose not aligned to 32 bytes.

    libjpeg-turbo writes aligned rows past the cache; these are read at once, and from main memory that would cost a
    fifth of decoding them.
    """
    memory = np.empty(num_bytes + 32, dtype=np.uint8)
    return memory[(16 - memory.ctypes.data) % 32 :][:num_bytes]
