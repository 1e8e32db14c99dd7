"""Small shard folders for tests of the streams, written by webdataset's own writer and indexed by tarfile."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from ecn_dist.data.index import ShardInfo, SplitIndex, member_dtype


def jpeg_bytes(rng: np.random.Generator, height: int, width: int) -> bytes:
    """A smooth random picture."""
    coarse = rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()


def write_split(
    folder: Path,
    shard_samples: list[int],
    *,
    num_cameras: int = 3,
    num_identities: int = 5,
    styles: bool = True,
    sizes: tuple[tuple[int, int], ...] = ((32, 16),),
    seed: int = 0,
) -> SplitIndex:
    """Write a train split: sample n has identity 10 (n mod P), camera n mod C, and the sizes in turn."""
    rng = np.random.default_rng(seed)
    count = sum(shard_samples)
    order = rng.permutation(count)  # the exemplar index is not the stored position
    members = np.zeros(count, member_dtype(num_cameras))
    shards, row = [], 0
    for shard, samples in enumerate(shard_samples):
        path = folder / f"train-{shard:06d}.tar"
        with webdataset.TarWriter(str(path)) as writer:
            for at in range(row, row + samples):
                index = int(order[at])
                camid = index % num_cameras
                pid = 10 * (index % num_identities)
                sample = {"__key__": f"{index:06d}", "jpg": jpeg_bytes(rng, *sizes[index % len(sizes)])}
                about = {"index": index, "pid": pid, "camid": camid, "file": f"{index}.jpg"}
                sample["json"] = json.dumps(about).encode()
                for camera in range(num_cameras if styles else 0):
                    if camera != camid:
                        sample[f"cam{camera:02d}.jpg"] = jpeg_bytes(rng, *sizes[index % len(sizes)])
                writer.write(sample)
                members[at] = (shard, index, pid, camid, 0, 0, 0, 0)
        _record_offsets(path, members, {f"{order[at]:06d}": at for at in range(row, row + samples)}, num_cameras)
        data = path.read_bytes()
        shards.append(ShardInfo(path.name, samples, len(data), hashlib.sha256(data).hexdigest()))
        row += samples
    np.save(folder / "train.members.npy", members)
    members = np.load(folder / "train.members.npy", mmap_mode="r")
    identities = tuple(10 * n for n in reversed(range(num_identities)))
    return SplitIndex("train", str(folder), tuple(shards), members, num_cameras, identities)


def _record_offsets(path: Path, members: np.ndarray, row_of: dict[str, int], num_cameras: int) -> None:
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            row = members[row_of[key]]
            if suffix == "json":
                row["json_offset"], row["json_length"] = member.offset_data, member.size
            else:
                slot = num_cameras if suffix == "jpg" else int(suffix[3:5])
                row["offset"][slot], row["length"][slot] = member.offset_data, member.size
