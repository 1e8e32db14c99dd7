"""Batches of bytes on their way to a device, where they become normalised images.

b samples of this rank, V views of each, H x W network input.
"""

from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ecn_dist.data import transforms
from ecn_dist.data.dataset import BOX, ROW, RawBatch, Request, fields_and_pixels
from ecn_dist.data.transforms import Augmentation

NO_LABEL = -1


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


def copy_queue(device: torch.device) -> torch.Stream | None:
    """A queue for copies to an accelerator; None where `device` is none, or there is none here."""
    return torch.Stream(device) if device.type != "cpu" and torch.accelerator.is_available() else None


def deliver(
    made: Generator[tuple[Request, RawBatch]],
    labels: np.ndarray | None,
    size: tuple[int, int],
    how: Augmentation,
    device: torch.device,
) -> Generator[tuple[Request, Batch]]:
    """Each request with its batch, on the device. Labels are the plan's, size is (H, W).

    Off the CPU the next batch is already on its way, in a queue of its own, while one is used: nothing here waits for
    the device, and it waits for nothing that was not copied before.
    """
    queue = copy_queue(device)

    def send(raw: RawBatch) -> Batch:
        rows_b = fields_and_pixels(raw.data, *size)[0][ROW]
        if labels is None or raw.error:
            rows_b.fill_(NO_LABEL)
        else:
            rows_b.copy_(torch.from_numpy(labels[rows_b.numpy()]))
        with queue or nullcontext():
            fields, pixels_bHW3 = fields_and_pixels(raw.data.to(device, non_blocking=True), *size)
            images_b3HW = transforms.normalise_and_erase(pixels_bHW3, fields[BOX].T, how)
            labels_b, pids_b, camids_b, indices_b = fields[:4].clone()
        copied = queue.record_event() if queue else None
        return Batch(images_b3HW, labels_b, pids_b, camids_b, indices_b, raw.error, raw.skipped, copied)

    on_the_way: list[tuple[Request, Batch]] = []
    try:
        for request, raw in made:
            on_the_way.append((request, send(raw)))
            if len(on_the_way) > (device.type != "cpu"):
                yield _taken_over(*on_the_way.pop(0), queue)
        for waiting in on_the_way:
            yield _taken_over(*waiting, queue)
    finally:
        made.close()


def _taken_over(request: Request, batch: Batch, queue: torch.Stream | None) -> tuple[Request, Batch]:
    """The same, for the device's present queue, which waits for the batch to be there."""
    if queue and batch.copied:
        present = torch.accelerator.current_stream(queue.device)
        present.wait_event(batch.copied)
        for tensor in (batch.images, batch.labels):  # the others are parts of the same memory as the labels
            tensor.record_stream(present)
    return request, batch
