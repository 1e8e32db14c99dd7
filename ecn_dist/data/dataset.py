"""What a loader worker does: the pictures of one step, read, decoded and resized to one batch of bytes.

b samples of this rank, V views of each, H x W network input, h x w stored picture.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ecn_dist.data import transforms
from ecn_dist.data.draws import Draws
from ecn_dist.data.index import SplitIndex
from ecn_dist.data.pictures import UnreadablePicture
from ecn_dist.data.reader import ShardReader, decode
from ecn_dist.data.transforms import Augmentation
from ecn_dist.errors import UserError

DECODED_BYTES = 1 << 20  # what is larger is decoded into memory of its own
STYLES = ("real", "random", "other", "all")
ROW, PID, CAMID, INDEX, BOX, NUM_FIELDS = 0, 1, 2, 3, slice(4, 8), 8  # of a batch's int64 fields
FIELD_BYTES = 8 * NUM_FIELDS


class Request(NamedTuple):
    """What a worker is asked for."""

    step: int
    rows_b: np.ndarray
    occurrences_b: np.ndarray
    pass_number: int
    stand_ins: Sequence[np.ndarray] = ()  # of each sample; none where nothing may be replaced


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


class PictureDataset(Dataset[RawBatch]):
    """Item `request`: its batch. Outside of loader workers it lasts until the next one is made.

    Fresh memory costs nearly as much as decoding (the system clears it page by page), so it serves again where that is
    safe.

    Args:
        split: what the requests' rows count in.
        reader: of the split's shards.
        seed, domain: of the random numbers.
        height, width, style, augmentation: see `TrainStream`.
    """

    def __init__(
        self,
        split: SplitIndex,
        height: int,
        width: int,
        reader: ShardReader,
        *,
        style: str = "real",
        augmentation: Augmentation | None = None,
        seed: int = 0,
        domain: str = "",
    ) -> None:
        self.split = split
        self.height, self.width = height, width
        self.reader = reader
        self.style = style
        self.augmentation = augmentation
        self.views = split.num_cameras if style == "all" else 1
        self._draws = Draws(seed, domain, "augmentation")
        self._erase_draws = Draws(seed, domain, "erasing")
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._decoded = _decoding_memory()

    def batch_bytes(self, samples: int) -> int:
        """Of a batch of so many samples."""
        return samples * self.views * (FIELD_BYTES + self.height * self.width * 3)

    def failed(self, samples: int, error: str) -> RawBatch:
        """A batch in full shape, with zeros for data."""
        return RawBatch(self._empty(samples).zero_(), error)

    def __getitem__(self, request: Request) -> RawBatch:
        data = self._empty(len(request.rows_b))
        try:
            return RawBatch(data, None, self._fill(data, request))
        except UserError as error:
            return self.failed(len(request.rows_b), str(error))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_memory": torch.empty(0, dtype=torch.uint8), "_decoded": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _decoded=_decoding_memory())

    def _empty(self, samples: int) -> Tensor:
        size = self.batch_bytes(samples)
        if get_worker_info() is not None:
            return torch.empty(size, dtype=torch.uint8)
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]

    def _fill(self, data: Tensor, request: Request) -> int:
        """Write the pictures that `request` asks for; returns how many samples were replaced."""
        fields, pixels = fields_and_pixels(data, self.height, self.width)
        fields_np = fields.numpy()
        rows_b, occurrences_b, pass_number = request.rows_b, request.occurrences_b, request.pass_number
        slots_bV, draws_bVK = self.choose(rows_b, occurrences_b, pass_number)
        pictures = self.reader.read_batch(self.split, rows_b.repeat(self.views), slots_bV.ravel())
        shown_b, V = rows_b.copy(), self.views
        for at, row in enumerate(rows_b.tolist()):
            views = slice(at * V, (at + 1) * V)
            problem = self._show(pixels[views], pictures[views], draws_bVK[at])
            if problem is None:
                continue
            for stand_in in request.stand_ins[at] if request.stand_ins else ():
                slots_1V, draws_1VK = self.choose(stand_in[None], occurrences_b[at : at + 1], pass_number)
                others = self.reader.read_batch(self.split, stand_in.repeat(V), slots_1V[0])
                if self._show(pixels[views], others, draws_1VK[0]) is None:
                    shown_b[at], draws_bVK[at] = stand_in, draws_1VK[0]
                    break
            else:
                view, error = problem
                raise self.reader.picture_error(self.split, row, int(slots_bV[at, view]), error) from error
        members_bV = np.asarray(self.split.members)[shown_b].repeat(V)
        fields_np[ROW] = shown_b.repeat(V)
        for field, name in ((PID, "pid"), (CAMID, "camid"), (INDEX, "index")):
            fields_np[field] = members_bV[name]
        fields_np[BOX] = self._boxes(draws_bVK, members_bV["index"], occurrences_b, pass_number)
        return int(np.count_nonzero(shown_b != rows_b))

    def choose(self, rows_b: np.ndarray, occurrences_b: np.ndarray, pass_number: int) -> tuple[np.ndarray, np.ndarray]:
        """(b, V) which pictures of each sample are shown, and (b, V, NUM_DRAWS) the draws that say how."""
        members_b = np.asarray(self.split.members)[rows_b]
        own_b1 = members_b["camid"].astype(np.int64)[:, None]
        addresses = (self._views_of(occurrences_b), members_b["index"].repeat(self.views), pass_number)
        draws_bVK = self._draws.uniforms(transforms.NUM_DRAWS, addresses).reshape(len(rows_b), self.views, -1)
        real = self.split.num_cameras
        if self.style == "random":  # its own camera's: the real picture
            slots_bV = transforms.draw_camera(draws_bVK[:, :, transforms.CAMERA], real)
            return np.where(slots_bV == own_b1, real, slots_bV), draws_bVK
        others_bV = np.arange(self.views - 1)[None]
        if self.style == "other":
            others_bV = transforms.draw_camera(draws_bVK[:, :, transforms.CAMERA], real - 1)
        slots_bV = others_bV + (others_bV >= own_b1)
        if self.style != "other":  # the real picture, then the other cameras' in their order, if any
            slots_bV = np.concatenate([np.full_like(own_b1, real), slots_bV], axis=1)
        return slots_bV, draws_bVK

    def _views_of(self, occurrences_b: np.ndarray) -> np.ndarray:
        """(b V,) the first number of the addresses: each view of each occurrence draws for itself."""
        return (occurrences_b[:, None] * self.views + np.arange(self.views)).ravel()

    def _show(
        self, out_VHW3: Tensor, data: Sequence[bytes], draws_VK: np.ndarray
    ) -> tuple[int, UnreadablePicture] | None:
        """Decode and resize one sample's pictures; which of them cannot be decoded, and why."""
        for view, draws in enumerate(draws_VK):
            try:
                pixels_hw3 = decode(data[view], self._decoded)
            except UnreadablePicture as error:
                return view, error
            if self.augmentation is None:
                transforms.resize_into(out_VHW3[view], pixels_hw3)
            else:  # plain floats: the arithmetic is scalar
                transforms.augment_into(out_VHW3[view], pixels_hw3, draws.tolist(), self.augmentation)
        return None

    def _boxes(
        self, draws_bVK: np.ndarray, indices: np.ndarray, occurrences_b: np.ndarray, pass_number: int
    ) -> np.ndarray:
        """(4, b V): what is erased of each picture; zeros for nothing."""
        boxes = np.zeros((len(indices), 4), dtype=np.int64)
        if self.augmentation is not None:
            chances = draws_bVK[:, :, transforms.ERASE].ravel()
            erased = np.flatnonzero(chances < self.augmentation.random_erasing)
            address = (self._views_of(occurrences_b)[erased], indices[erased], pass_number)
            draws = self._erase_draws.uniforms(transforms.NUM_ERASE_DRAWS, address).tolist()
            for at, row in zip(erased, draws, strict=True):
                boxes[at] = transforms.erase_box(row, self.height, self.width, self.augmentation)
        return boxes.T


def _decoding_memory() -> np.ndarray:
    """Memory to decode one picture after the other into, on purpose not aligned to 32 bytes.

    libjpeg-turbo writes to aligned rows past the cache, and reading them back would take longer; fresh memory is
    cleared by the system page by page. Together that is a tenth of decoding and resizing.
    """
    memory = np.empty(DECODED_BYTES + 32, dtype=np.uint8)
    skipped = (16 - memory.ctypes.data) % 32
    return memory[skipped : skipped + DECODED_BYTES]
