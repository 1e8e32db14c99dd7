"""What the streams have in common: batches made by a loader, delivered on a device.

b samples of this rank, V views of each, H x W network input.
"""

from collections.abc import Generator, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ecn_dist.data import transforms
from ecn_dist.data.cache import ShardCache
from ecn_dist.data.dataset import BOX, ROW, STYLES, PictureDataset, RawBatch, Request, fields_and_pixels
from ecn_dist.data.fetch import shown
from ecn_dist.data.fetch_ahead import FetchAhead
from ecn_dist.data.index import SplitIndex, is_url
from ecn_dist.data.loader import Loader, check_shared_memory, start_fork_server
from ecn_dist.data.reader import ShardReader
from ecn_dist.data.transforms import Augmentation
from ecn_dist.errors import UserError

NO_LABEL = -1
Style = Literal["real", "random", "other", "all"]


@dataclass
class Batch:
    """One rank's part of a global batch, on the stream's device. Where V > 1, a sample's views lie side by side."""

    images: Tensor  # (b V, 3, H, W) float32, normalised
    labels: Tensor  # (b V,) int64: as the plan says; NO_LABEL where it says nothing
    pids: Tensor  # (b V,) int64, for evaluation and diagnostics
    camids: Tensor  # (b V,) int64, the camera that took the picture, whatever style it appears in
    indices: Tensor  # (b V,) int64, exemplar index
    error: str | None = None  # why this batch must not be used; its tensors then hold zeros
    skipped: int = 0  # how many of these b samples stand in for one that could not be decoded; of this rank alone
    copied: torch.Event | None = None  # on an accelerator: when its tensors are there


class Stream:
    """A split, what of it is shown, and the workers that read it. Nothing is started before it is needed."""

    def __init__(
        self,
        split: SplitIndex,
        height: int,
        width: int,
        style: Style,
        workers: int,
        device: torch.device,
        cache: ShardCache | None,
    ) -> None:
        if style not in STYLES:
            raise ValueError(f"style {style!r} is none of {', '.join(STYLES)}")
        if style != "real" and not split.has_styles:
            raise UserError(
                f"{shown(split.folder)} lacks {split.missing_styles} style copies of its split {split.name!r}, and "
                "pictures are to be shown in other cameras' styles (data.camera_style): pack it with --camera_style "
                "histogram, or with the complete copies that ship with the data set; or train without: "
                "--data.camera_style false"
            )
        if style == "other" and split.num_cameras < 2:
            raise UserError(f"{shown(split.folder)} has one camera: no picture has a copy in the style of another")
        self._split, self._style = split, style
        self._height, self._width = height, width
        self._workers, self._device, self._cache = workers, device, cache
        self._dataset: PictureDataset | None = None
        self._loader: Loader | None = None

    def start(self) -> None:
        """Have everything that takes time or room: the cache of a URL's shards, shared memory, the workers' server.

        The first iteration does it, too; to call it before tells mistakes early.

        Raises:
            UserError: too little shared memory for the workers, or too small a cache.
        """
        if self._dataset is not None:
            return
        split, reader = _reader(self._split, self._cache)
        dataset = self._make_dataset(split, reader)
        if self._workers:
            check_shared_memory(dataset.batch_bytes(self._samples()), self._workers)
            start_fork_server()
        self._dataset = dataset
        pin_memory = self._device.type != "cpu" and torch.accelerator.is_available()
        self._loader = Loader(dataset, self._workers, pin_memory)

    def close(self) -> None:
        """End the workers. Another iteration would start others."""
        if self._loader is not None:
            self._loader.close()

    def _make_dataset(self, split: SplitIndex, reader: ShardReader) -> PictureDataset:
        return PictureDataset(split, self._height, self._width, reader, style=self._style)

    def _samples(self) -> int:
        """The most that a batch of this rank has."""
        raise NotImplementedError

    def _load(
        self, requests: Iterable[Request], ahead: FetchAhead | None, labels: np.ndarray | None, how: Augmentation
    ) -> Generator[tuple[Request, Batch]]:
        """Each request with its batch, on the device.

        On an accelerator the next batch is already on its way, in a queue of its own, while one is used: nothing here
        waits for the device, and it waits for nothing that was not copied before.
        """
        assert self._loader is not None
        made = self._loader.load(requests)
        on_device = self._device.type != "cpu"
        queue = torch.Stream(self._device) if on_device and torch.accelerator.is_available() else None
        following: tuple[Request, Batch] | None = None
        try:
            for request, raw in made:
                if ahead:
                    ahead.reached(request.step)
                ready, following = following, (request, self._finish(raw, labels, how, queue))
                if not on_device:
                    ready, following = following, None
                if ready:
                    yield ready[0], _taken_over(ready[1], queue)
            if following:
                yield following[0], _taken_over(following[1], queue)
        finally:
            made.close()
            if ahead:
                ahead.stop()

    def _ahead(self, requests: Iterable[Request]) -> FetchAhead | None:
        """Fetches what another iteration of the same requests needs."""
        assert self._dataset is not None
        cache = self._dataset.reader.cache
        return FetchAhead(self._dataset.split, cache, requests) if cache else None

    def _finish(self, raw: RawBatch, labels: np.ndarray | None, how: Augmentation, queue: torch.Stream | None) -> Batch:
        rows_b = fields_and_pixels(raw.data, self._height, self._width)[0][ROW]
        if labels is None or raw.error:
            rows_b.fill_(NO_LABEL)
        else:
            rows_b.copy_(torch.from_numpy(labels[rows_b.numpy()]))
        with queue or nullcontext():
            data = raw.data.to(self._device, non_blocking=True)
            fields, pixels_bHW3 = fields_and_pixels(data, self._height, self._width)
            images_b3HW = transforms.normalise_and_erase(pixels_bHW3, fields[BOX].T, how)
            labels_b, pids_b, camids_b, indices_b = fields[:4].clone()
        copied = queue.record_event() if queue else None
        return Batch(images_b3HW, labels_b, pids_b, camids_b, indices_b, raw.error, raw.skipped, copied)


def _taken_over(batch: Batch, queue: torch.Stream | None) -> Batch:
    """The batch, for the device's present queue, which waits for it to be there."""
    if queue and batch.copied:
        present = torch.accelerator.current_stream(queue.device)
        present.wait_event(batch.copied)
        for tensor in (batch.images, batch.labels):  # the others are parts of the same memory as the labels
            tensor.record_stream(present)
    return batch


def _reader(split: SplitIndex, cache: ShardCache | None) -> tuple[SplitIndex, ShardReader]:
    """The reader for a split, and the split with members that workers can map."""
    if not is_url(split.folder):
        return split, ShardReader()
    cache = cache or ShardCache.of_host()
    cache.check_room(split.shards, split.members.nbytes)
    return replace(split, members=cache.map_members(split.members)), ShardReader(cache)
