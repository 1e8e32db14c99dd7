"""Members of shards, read by the byte offsets of the index, and decoded.

A read takes exactly the member's bytes: no tar header, and no style copy that was not drawn.
"""

import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter

import numpy as np
import simplejpeg
from numpy.typing import ArrayLike
from PIL import Image

from ecn_dist.data import pictures
from ecn_dist.data.cache import ShardCache
from ecn_dist.data.fetch import shown
from ecn_dist.data.index import SplitIndex, is_url
from ecn_dist.data.index_gate import REMEDY
from ecn_dist.errors import UserError

MAX_OPEN_SHARDS = 64
READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe under a shard's name is not waited for
ALIKE = ("YCbCr", "Gray", "RGB")  # kinds of JPEG that both decoders turn into the same RGB
EXIF = b"Exif\0\0"
SEGMENT = struct.Struct(">HH")  # of a JPEG: its marker, and its length from there on
SEGMENTS, EXIF_SEGMENT, PICTURE_SEGMENT = range(0xFFC0, 0xFFFF), 0xFFE1, 0xFFDA


def decode(data: bytes, buffer: np.ndarray | None = None) -> np.ndarray:
    """A picture of one of `pictures.FORMATS` -> (h, w, 3) uint8 RGB, the pixels that PIL gives; `UnreadablePicture`.

    The result may be a view of `buffer`, of bytes, where that is large enough.
    """
    try:
        # Both decode with libjpeg-turbo and the same settings, hence to the same pixels, but PIL's way to it is twice
        # as long for a small picture. It stays the judge of what simplejpeg refuses, such as harmless stray bytes.
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ALIKE or _is_turned(data):
            raise ValueError("simplejpeg gives other pixels")
        pictures.check_size(height, width)
        fits = buffer is not None and buffer.size >= height * width * 3
        return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=buffer if fits else None)
    except ValueError:
        return np.array(pictures.decode(data))


def _is_turned(data: bytes) -> bool:
    """Whether a JPEG's EXIF data turn it. They are looked for among the segments that come before the picture's."""
    at, marker = 2, SEGMENTS[0]
    while marker in SEGMENTS and at + SEGMENT.size <= len(data):
        marker, length = SEGMENT.unpack_from(data, at)
        if marker == EXIF_SEGMENT and data.startswith(EXIF, at + SEGMENT.size):
            break
        if marker == PICTURE_SEGMENT:
            return False
        at += 2 + length
    return pictures.is_turned(data)


class ShardReader:
    """Reads members by offset. Local shards stay open (the least recently used of many are closed).

    Those behind a URL come from `cache`, without one from `ShardCache.of_host()`.
    """

    def __init__(self, cache: ShardCache | None = None) -> None:
        self._cache = cache
        self._open: OrderedDict[str, int] = OrderedDict()

    def cache_of(self, split: SplitIndex) -> ShardCache | None:
        """The cache of the shards behind a URL; None for local ones."""
        if not is_url(split.folder):
            return None
        self._cache = self._cache or ShardCache.of_host()
        return self._cache

    def read_batch(self, split: SplitIndex, rows: ArrayLike, slots: ArrayLike) -> list[bytes]:
        """The bytes of members, in the given order; read shard by shard, so that only one at a time is held.

        `rows` are of `split.members`; slot c is the copy in camera c's style, if it was packed, and C the real picture.
        Raises `UserError` where a shard is gone, cannot be fetched or read, or is shorter than when it was packed.
        """
        rows, slots = np.asarray(rows), np.asarray(slots)
        members, every = np.asarray(split.members)[rows], np.arange(rows.size)
        columns = members["shard"], members["offset"][every, slots], members["length"][every, slots], every
        wanted = sorted(zip(*(column.tolist() for column in columns), strict=True))
        by_shard = [(shard, list(of_shard)) for shard, of_shard in groupby(wanted, key=itemgetter(0))]
        if not is_url(split.folder) and hasattr(os, "posix_fadvise"):
            for shard, of_shard in by_shard:  # a cold disk reads them together, and not each when its turn comes
                with self._shard(split, shard) as descriptor, suppress(OSError):  # only a hint
                    for _, offset, length, _ in of_shard:
                        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        data = [b""] * len(wanted)
        for shard, of_shard in by_shard:
            with self._shard(split, shard) as descriptor:
                for _, offset, length, at in of_shard:
                    data[at] = os.pread(descriptor, length, offset)
                    if len(data[at]) != length:
                        raise UserError(
                            f"{shown(split.shard_path(shard))} ends within the picture at byte {offset}, "
                            f"{_sample(split, rows[at])}: it was cut short or changed after it was packed. {REMEDY}"
                        )
        return data

    def read_picture(self, split: SplitIndex, row: int, slot: int | None = None) -> Image.Image:
        """One picture, RGB; the real one where no slot is given. `UserError` where it cannot be had."""
        slot = split.num_cameras if slot is None else slot
        try:
            (data,) = self.read_batch(split, [row], [slot])
            return Image.fromarray(decode(data))
        except pictures.UnreadablePicture as error:
            raise picture_error(split, row, slot, error) from error

    def read_about(self, split: SplitIndex, row: int) -> bytes:
        """The sample's KEY.json, as it is stored."""
        member = split.members[row]
        with self._shard(split, int(member["shard"])) as descriptor:
            return os.pread(descriptor, int(member["json_length"]), int(member["json_offset"]))

    def read_file_names(self, split: SplitIndex, rows: Iterable[int]) -> list[str]:
        """Names that the pictures had in the data set. `UserError` where a row's KEY.json does not belong to it."""
        names = []
        for row in rows:
            try:
                about = json.loads(self.read_about(split, row))
                name = about["file"] if about["index"] == split.members["index"][row] else None
            except (ValueError, KeyError, TypeError, RecursionError):
                name = None
            if not isinstance(name, str):
                shard = shown(split.shard_path(int(split.members["shard"][row])))
                raise UserError(
                    f"{shard}: the KEY.json of {_sample(split, row)} is not the one that was packed. {REMEDY}"
                )
            names.append(name)
        return names

    def close(self) -> None:
        """Close all shards; they open again when they are needed."""
        while self._open:
            os.close(self._open.popitem()[1])

    @contextmanager
    def _shard(self, split: SplitIndex, shard: int) -> Iterator[int]:
        """A descriptor of the shard. `UserError` where it, or what the block does with it, cannot be read."""
        path = split.shard_path(shard)
        if cache := self.cache_of(split):
            with cache.open(path, split.shards[shard]) as descriptor:
                yield descriptor
            return
        try:
            if path not in self._open:
                self._open[path] = os.open(path, READ_FLAGS)
                if len(self._open) > MAX_OPEN_SHARDS:
                    os.close(self._open.popitem(last=False)[1])
            self._open.move_to_end(path)
            yield self._open[path]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}). {REMEDY}") from error

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[ShardCache | None]]:
        return ShardReader, (self._cache,)  # descriptors belong to one process

    def __del__(self) -> None:
        self.close()


def picture_error(split: SplitIndex, row: int, slot: int, error: Exception) -> UserError:
    """The error that names the shard and the member that cannot be decoded."""
    style = "" if slot == split.num_cameras else f".cam{slot:02d}"
    path = shown(split.shard_path(int(split.members["shard"][row])))
    cached = ", or remove the shard from the cache, if only its copy there is damaged" if is_url(split.folder) else ""
    return UserError(
        f"{path}: {split.members['index'][row]:08d}{style}.jpg ({_sample(split, row)}) cannot be decoded: {error}. "
        f"Repair the picture and pack again (`train --data.max_bad_samples N` replaces up to N of them){cached}"
    )


def _sample(split: SplitIndex, row: int) -> str:
    return f"sample {int(split.members['index'][row])} of split {split.name!r}"


def check_shards(*splits: SplitIndex) -> None:
    """Open every local shard and compare its size with the index; one behind a URL is checked when it is fetched.

    Raises `UserError`, which names the first few that are missing, may not be read, or are of another size. No
    collective: call it through `distributed.together`, as one host alone may lack a shard.
    """
    wrong = []
    for split in splits:
        for number, shard in enumerate(() if is_url(split.folder) else split.shards):
            path = split.shard_path(number)
            try:
                with open(os.open(path, READ_FLAGS), "rb") as file:  # one that may not be read has a size, too
                    size = os.fstat(file.fileno()).st_size
            except OSError as error:
                wrong.append(f"{path}: {error.strerror}")
                continue
            if size != shard.bytes:
                wrong.append(f"{path}: {size} bytes, where the index says {shard.bytes}")
    if wrong:
        lines = [f"{len(wrong)} shards are missing or not what was packed:", *wrong[:5]]
        lines += [f"and {len(wrong) - 5} more"] * (len(wrong) > 5)
        raise UserError("\n  ".join(lines) + f"\n{REMEDY}")
