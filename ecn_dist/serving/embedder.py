"""A trained model as a function: pictures in, features out.

    from ecn_dist import Embedder

    embedder = Embedder.load("runs/m2d")
    features = embedder(["a.jpg", "b.jpg"])          # (2, C) float32, rows of unit length
    similarity = features[0] @ features[1]           # 1 for the same picture

Shape letters: n pictures, b of them in a batch, C feature length, H x W network input, h x w picture.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.config import Config
from ecn_dist.data import transforms
from ecn_dist.data.pictures import UnreadablePicture, decode, read_file, to_rgb
from ecn_dist.errors import UserError
from ecn_dist.models import Backbone, autocast, fingerprint_backbone, normalized_features
from ecn_dist.training.trained import load_trained

MAX_READERS = 8  # threads that read, decode and resize; Pillow and torch do so without holding Python's lock


class PictureFile(NamedTuple):
    """The bytes of a picture file that was read already; `name` is what errors call it."""

    name: str
    data: bytes


Picture = str | os.PathLike[str] | PictureFile | Image.Image | np.ndarray


class Embedder:
    """Pictures -> features of unit length, the ones that `evaluate` compares (Euclidean distance, or dot product)."""

    def __init__(self, backbone: Backbone, config: Config, device: torch.device) -> None:
        """Use `load`, unless the backbone is at hand: in evaluation mode and on `device`, as `load_trained` gives."""
        self.backbone, self.config, self.device = backbone, config, device
        self.height, self.width = config.data.height, config.data.width

    @classmethod
    def load(
        cls,
        run_or_weights: str | os.PathLike[str],
        device: str | torch.device = "auto",
        config: str | os.PathLike[str] | None = None,
    ) -> "Embedder":
        """The model that a run left.

        Args:
            run_or_weights: a run folder, a checkpoint in it, or a file of weights.
            device: auto (the accelerator, else the CPU), cpu, cuda, ...
            config: the run's config.yaml, where the weights lie elsewhere than in their run folder.

        Raises:
            UserError: there is no such file, it does not fit the configuration, or there is no such device.
        """
        path = Path(run_or_weights)
        if not path.exists():
            raise UserError(f"there is no {path}; name a run folder, a checkpoint in one, or a file of weights")
        where = distributed.resolve_device(str(device))
        # Networks are made with random weights before they are filled; the caller's random numbers stay as they were.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            backbone, configuration = load_trained(path, where, None if config is None else Path(config))
        return cls(backbone, configuration, where)

    @property
    def num_features(self) -> int:
        """C, the length of a feature."""
        return self.backbone.num_features

    @cached_property
    def fingerprint(self) -> str:
        """Names the model: features are comparable if their models' fingerprints are equal."""
        return fingerprint_backbone(self.backbone, self.height, self.width)

    def __call__(self, pictures: Iterable[Picture], batch_size: int = 128) -> np.ndarray:
        """Embed pictures: (n, C) float32, row i for picture i, of unit length; (0, C) where there are none.

        Args:
            pictures: paths, `PictureFile`s, PIL pictures, and arrays (h, w, 3) uint8 in the order red, green, blue, in
                any mix. A generator is read as it is needed, two batches at a time. Pictures are turned upright as
                their EXIF orientation says; of 16-bit grey ones, values are divided by 257.
            batch_size: pictures that go through the network at once. It changes memory and speed, and features by
                rounding alone.

        Raises:
            UserError: a picture cannot be read, named by its file or its place; or the features are not finite.
        """
        if isinstance(pictures, str | os.PathLike | Image.Image | PictureFile):
            raise UserError("the embedder takes a list of pictures; for one picture: embedder([picture])[0]")
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} must be 1 or more")
        features = map(self._embed, self._batches(pictures, batch_size))
        features_nC = np.concatenate([np.empty((0, self.num_features), dtype=np.float32), *features])
        if not np.isfinite(features_nC).all():
            raise UserError("the network gives features that are not finite: its weights are damaged, or it diverged")
        return features_nC

    @torch.inference_mode()
    def _embed(self, pixels_bHW3: Tensor) -> np.ndarray:
        images = transforms.normalise_and_erase(pixels_bHW3.to(self.device))
        with autocast(self.config.precision, self.device):
            features_bC = normalized_features(self.backbone, images.to(next(self.backbone.parameters()).dtype))
        return features_bC.to("cpu", torch.float32).numpy()

    def _batches(self, pictures: Iterable[Picture], batch_size: int) -> Iterator[Tensor]:
        """(b, H, W, 3) uint8; one batch is read while the network works on the one before."""
        numbered = enumerate(pictures)
        with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as readers:

            def start_reading() -> list[Future[Tensor]]:
                return [readers.submit(self._read, picture, place) for place, picture in islice(numbered, batch_size)]

            reading = start_reading()
            try:
                while reading:
                    ready, reading = reading, start_reading()
                    yield torch.stack([picture.result() for picture in ready])
            finally:
                readers.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def _read(self, picture: Picture, place: int) -> Tensor:
        """The picture as network input before normalising: (H, W, 3) uint8."""
        pixels_HW3 = torch.empty((self.height, self.width, 3), dtype=torch.uint8)
        transforms.resize_into(pixels_HW3, _pixels_of(picture, place))
        return pixels_HW3


def _pixels_of(picture: Picture, place: int) -> np.ndarray:
    """(h, w, 3) uint8, writable and contiguous. `UserError` with the picture's name, or its `place` in the list."""
    name = f"picture {place}"
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            given = f"{picture.dtype} of shape {picture.shape}"
            raise UserError(f"{name}: an array must be uint8 of shape (height, width, 3), RGB; this is {given}")
        return np.array(picture, order="C")
    if isinstance(picture, str | os.PathLike):
        picture = read_picture(picture, f" as {name}")
    if isinstance(picture, PictureFile):
        name = picture.name
    elif not isinstance(picture, Image.Image):
        kind = type(picture).__name__
        raise UserError(f"{name}: must be a path, a PIL picture or an array (height, width, 3), not {kind}")
    elif not (picture.width and picture.height):
        raise UserError(f"{name}: has no pixels, it is {picture.width} x {picture.height}")
    try:
        return np.array(decode(picture.data) if isinstance(picture, PictureFile) else to_rgb(picture))
    except Exception as error:  # a file that PIL opened is decoded here, and its readers raise almost anything
        reason = str(error) or type(error).__name__
        raise UserError(f"{name}: cannot be decoded as a picture ({reason}); repair it, or leave it out") from error


def read_picture(path: str | os.PathLike[str], use: str = "") -> PictureFile:
    """The picture file's bytes under its path's name. Raises `UserError` where it cannot be read (for its `use`)."""
    try:
        return PictureFile(str(path), read_file(path))
    except (OSError, UnreadablePicture) as error:
        raise UserError(f"{path}: cannot be read{use}: {getattr(error, 'strerror', error)}") from error
