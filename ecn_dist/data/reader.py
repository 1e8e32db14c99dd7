"""Members of shards, read by the byte offsets of the index, and decoded.

A read takes exactly the member's bytes: no tar header, and no style copy that was not drawn.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby

import numpy as np
import simplejpeg
from numpy.typing import ArrayLike
from PIL import Image

from ecn_dist.data import pictures
from ecn_dist.data.cache import FOLDER_VARIABLE, ShardCache
from ecn_dist.data.fetch import shown
from ecn_dist.data.index import SplitIndex, is_url
from ecn_dist.data.index_gate import REMEDY
from ecn_dist.errors import UserError

MAX_OPEN_SHARDS = 64
READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe under a shard's name is not waited for
ALIKE = ("YCbCr", "Gray", "RGB")  # kinds of JPEG that both decoders turn into the same RGB
EXIF = b"Exif\0\0"
TAR_BLOCK = 512
TAR_NAME = 100  # a header starts with the member's name, in this many bytes


class PictureError(UserError):
    """One picture cannot be decoded; the shard around it is sound."""


def decode(data: bytes, memory: np.ndarray | None = None) -> np.ndarray:
    """The bytes of a picture -> (h, w, 3) uint8 RGB, the pixels that PIL gives.

    Args:
        data: a JPEG, or a picture of another of `pictures.FORMATS`.
        memory: for the result, used if it is large enough; the result is then a view of it.

    Raises:
        UnreadablePicture: the data cannot be decoded.
    """
    try:
        # Both decode with libjpeg-turbo and the same settings, hence to the same pixels, but PIL's way to it is twice
        # as long for a small picture. It stays the judge of what simplejpeg refuses, such as harmless stray bytes.
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ALIKE or (EXIF in data and pictures.is_turned(data)):
            raise ValueError("simplejpeg gives other pixels")
        pictures.check_size(height, width)
        return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=memory)
    except ValueError:
        return np.array(pictures.decode(data))


class ShardReader:
    """Reads members by offset.

    Local shards stay open (the least recently used of many are closed). Those behind a URL come from `cache`, without
    one from `ShardCache.of_host()`.
    """

    def __init__(self, cache: ShardCache | None = None) -> None:
        self.cache = cache
        self.bytes_read = 0  # from shards
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, split: SplitIndex, row: int, slot: int) -> bytes:
        """The bytes of one member.

        Args:
            split: the split that `row` counts in.
            row: of `split.members`.
            slot: c for the copy in camera c's style, `split.num_cameras` for the real picture.

        Raises:
            UserError: there is no such member, or its shard is gone, cannot be fetched or read, or is shorter than when
                it was packed.
        """
        return self.read_batch(split, [row], [slot])[0]

    def read_batch(self, split: SplitIndex, rows: ArrayLike, slots: ArrayLike) -> list[bytes]:
        """`read` of several members, in the given order; shard by shard, so that only one at a time is held."""
        rows = np.asarray(rows)
        members = np.asarray(split.members)[rows]
        every, slots = np.arange(len(members)), np.asarray(slots)
        offsets, lengths = members["offset"][every, slots], members["length"][every, slots]
        for at in np.flatnonzero(lengths == 0)[:1]:
            raise UserError(
                f"{_sample(split, rows[at])} in {shown(split.folder)} has no copy in the style of camera {slots[at]}: "
                "pack it with --camera_style histogram, or with complete copies; or train without: "
                "--data.camera_style false"
            )
        data = [b""] * len(members)
        order = np.lexsort((offsets, members["shard"])).tolist()
        shards, offsets, lengths = members["shard"].tolist(), offsets.tolist(), lengths.tolist()
        if not is_url(split.folder):
            self._announce(split, ((shards[at], lengths[at], offsets[at]) for at in order))
        for shard, places in groupby(order, key=shards.__getitem__):
            with self._shard(split, shard) as descriptor:
                for at in places:
                    data[at] = self._read(split, rows[at], descriptor, lengths[at], offsets[at])
                    self.bytes_read += len(data[at])
                    if len(data[at]) != lengths[at]:
                        raise UserError(
                            f"{shown(split.shard_path(shard))} ends within the picture at byte {offsets[at]}, "
                            f"{_sample(split, rows[at])}: it was cut short or changed after it was packed. Copy it "
                            "again, or pack the data set again"
                        )
        return data

    def read_picture(self, split: SplitIndex, row: int, slot: int | None = None) -> Image.Image:
        """One picture, RGB; the real one where no slot is given. `PictureError` where it cannot be decoded."""
        slot = split.num_cameras if slot is None else slot
        data = self.read(split, row, slot)
        try:
            return Image.fromarray(decode(data))
        except pictures.UnreadablePicture as error:
            raise self.picture_error(split, row, slot, error) from error

    def read_about(self, split: SplitIndex, row: int) -> bytes:
        """The sample's KEY.json, as it is stored."""
        member = split.members[row]
        with self._shard(split, int(member["shard"])) as descriptor:
            return self._read(split, row, descriptor, int(member["json_length"]), int(member["json_offset"]))

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

    def picture_error(self, split: SplitIndex, row: int, slot: int, error: Exception) -> PictureError:
        """The error that names the shard and the member that cannot be decoded."""
        member = split.members[row]
        shard = int(member["shard"])
        with self._shard(split, shard) as descriptor:
            header = self._read(split, row, descriptor, TAR_NAME, max(0, int(member["offset"][slot]) - TAR_BLOCK))
        name = shown(header.split(b"\0", 1)[0].decode("ascii", "replace"))
        return PictureError(
            f"{shown(split.shard_path(shard))}: {name} ({_sample(split, row)}) cannot be decoded: {error}. Repair the "
            "picture and pack again, or let up to N bad pictures be replaced: --data.max_bad_samples N"
        )

    def close(self) -> None:
        """Close all shards; they open again when they are needed."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, split: SplitIndex, row: int, descriptor: int, length: int, offset: int) -> bytes:
        try:
            return os.pread(descriptor, length, offset)
        except OSError as error:
            where, remedy = "", "Check the file system it is on. Copy the shard folder again, or to another disk"
            if self.cache and is_url(split.folder):
                where = f" in the shard cache {self.cache.folder}"
                remedy = f"Check the disk it is on, or name another folder with {FOLDER_VARIABLE}"
            raise UserError(
                f"{shown(split.shard_path(int(split.members['shard'][row])))}{where} cannot be read at byte {offset}, "
                f"{_sample(split, row)} ({error.strerror}). {remedy}"
            ) from error

    def _announce(self, split: SplitIndex, parts: Iterable[tuple[int, int, int]]) -> None:
        """Have the system read (shard, length, offset) from a cold disk together, and not each when its turn comes."""
        if hasattr(os, "posix_fadvise"):
            for shard, length, offset in parts:
                descriptor = self._local(split.shard_path(shard))
                with suppress(OSError):  # only a hint: what is wrong shows in the read that follows
                    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    @contextmanager
    def _shard(self, split: SplitIndex, shard: int) -> Iterator[int]:
        path = split.shard_path(shard)
        if is_url(split.folder):
            self.cache = self.cache or ShardCache.of_host()
            with self.cache.open(path, split.shards[shard]) as descriptor:
                yield descriptor
        else:
            yield self._local(path)

    def _local(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            descriptor = self._open[path] = os.open(path, READ_FLAGS)
        except OSError as error:
            raise UserError(f"{path} cannot be opened ({error.strerror}). {REMEDY}") from error
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[ShardCache | None]]:
        return ShardReader, (self.cache,)  # descriptors belong to one process

    def __del__(self) -> None:
        self.close()


def _sample(split: SplitIndex, row: int) -> str:
    return f"sample {int(split.members['index'][row])} of split {split.name!r}"


def check_shards(*splits: SplitIndex) -> None:
    """Open every local shard and compare its size with the index, before the first step.

    A shard behind a URL is checked when it is fetched. No collective: call it through `distributed.together`, so that
    a shard that one host alone lacks is an error on all ranks.

    Raises:
        UserError: shards are missing, may not be read, or are of another size; the first few are named.
    """
    wrong = []
    for split in splits:
        for number, shard in enumerate(() if is_url(split.folder) else split.shards):
            path = split.shard_path(number)
            try:
                descriptor = os.open(path, READ_FLAGS)  # one that may not be read has a size, too
                size = os.fstat(descriptor).st_size
                os.close(descriptor)
            except OSError as error:
                wrong.append(f"{path}: {error.strerror}")
                continue
            if size != shard.bytes:
                wrong.append(f"{path}: {size} bytes, where the index says {shard.bytes}")
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{len(wrong)} shards are missing or not what was packed:\n  "
            + "\n  ".join(wrong[:5])
            + f"{more}\n{REMEDY}"
        )
