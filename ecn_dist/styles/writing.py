"""Shards with learnt style copies: every rank makes those of its pictures, then the ranks share writing the shards.

b pictures of a batch, n of a split, C cameras.
"""

import hashlib
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ecn_dist import distributed
from ecn_dist.data import Batch, ShardIndex, SplitIndex
from ecn_dist.data.index import INDEX_NAME, ShardInfo
from ecn_dist.data.pictures import encode
from ecn_dist.data.reader import ShardReader, check_shards
from ecn_dist.errors import UserError
from ecn_dist.packing.shards import add_sample, describe_file, new_shards, open_shard, write_index
from ecn_dist.ranking.features import EvaluationInput, part_stream
from ecn_dist.reporting.model_card import fingerprint
from ecn_dist.styles.networks import Generator, to_pixels, to_unit
from ecn_dist.styles.options import Config

MADE_OF = "made_of"  # in index.json
BATCH_SIZE = 64  # pictures of a rank that get copies at once
Written = tuple[ShardInfo, np.ndarray]  # a shard, and its rows of the sidecar


def open_data(folder: str) -> ShardIndex:
    """The shard folder, its shards there and of their size. `UserError` where no styles can be learnt from it."""
    index = ShardIndex.load(folder)
    check_shards(*map(index.split, index.splits))
    if index.num_cameras < 2:
        raise UserError(f"{folder} has one camera: no picture has a copy in the style of another")
    if without := sorted(set(range(index.num_cameras)) - set(index.split("train").camids.tolist())):
        names = ", ".join(index.cameras[camid] for camid in without[:5])
        problem = f"{folder} has no training picture of camera {names}, so its style cannot be learnt"
        raise UserError(f"{problem}. Add some, or pack without that camera")
    return index


def write_copies(index: ShardIndex, generator: Generator, config: Config, device: torch.device) -> None:
    """Write the shards of `index` to `config.output`, with each training picture's copies in the other cameras' styles.

    The same shards with the same samples, so training plans the same; pictures stay as they are, byte for byte, and
    copies have the generator's size. Collective; the folder gets all its files, or none. Where it holds these very
    shards, of a run that ended before it was finished, nothing is done.

    Raises:
        UserError: on all ranks, for a generator of other cameras, pictures that cannot be decoded, and a folder that
            cannot be written, holds shards, or is not seen by all ranks.
    """
    if generator.shape.cameras != index.cameras:
        known, there = (", ".join(names) for names in (generator.shape.cameras, index.cameras))
        problem = f"--generator knows the cameras {known}, and {index.folder} has {there}; train one on these data"
        raise UserError(problem, on_all_ranks=True)
    made_of = _origin(index, generator)
    if distributed.on_main(lambda: _holds(config.output, made_of)):
        return
    with ExitStack() as stack:
        folder = distributed.on_main(lambda: stack.enter_context(new_shards(Path(config.output))))
        distributed.together(lambda: _check_seen(folder))
        size = EvaluationInput(generator.shape.height, generator.shape.width, BATCH_SIZE, config.workers)
        stream, console = part_stream(index.split("train"), size, device=device), Console(stderr=True)
        hidden = not (distributed.is_main() and console.is_terminal)
        batches = track(stream, "copies", len(stream), console=console, disable=hidden)
        made = distributed.together(lambda: _make_copies(batches, generator, folder), config.output)
        places_nC2 = distributed.all_gather_uneven_rows(made).unflatten(1, (-1, 2)).numpy()
        jobs = [(split, shard) for split in map(index.split, index.splits) for shard in range(len(split.shards))]
        own = jobs[distributed.rank() :: distributed.world_size()]
        written = distributed.together(lambda: [_write_shard(folder, *job, places_nC2) for job in own], config.output)
        parts = distributed.gather_objects(written)
        shards = [shard for part in parts for shard in part]
        distributed.on_main(lambda: _describe(index, folder, shards, made_of), config.output)
        distributed.together(stack.close)


def _origin(index: ShardIndex, generator: Generator) -> str:
    """Names pictures and generator, for the index of the shards that are made of them."""
    digest = hashlib.sha256(fingerprint(index).encode())
    for tensor in generator.state_dict().values():
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def _holds(output: str, made_of: str) -> bool:
    return (Path(output) / INDEX_NAME).is_file() and ShardIndex.load(output).about.get(MADE_OF) == made_of


def _check_seen(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"rank {distributed.rank()} does not see {folder}: name an --output that all hosts share")


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"copies-{rank}"


@torch.inference_mode()
def _make_copies(batches: Iterable[Batch], generator: Generator, folder: Path) -> Tensor:
    """Write the copies of this rank's pictures to its file; (n, 2 C) int64 offset and length there, by camera."""
    parts, failure = [torch.empty((0, 2 * len(generator.shape.cameras)), dtype=torch.int64)], None
    with _file_of(folder, distributed.rank()).open("wb") as file:
        for batch in batches:  # to its end on every rank, which is a collective
            try:
                parts.append(_copies_of(batch, generator, file) if failure is None else parts[0])
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure
    return torch.cat(parts)


def _copies_of(batch: Batch, generator: Generator, file: BinaryIO) -> Tensor:
    """Append a batch's copies to the file; (b, 2 C) int64 as above."""
    num_cameras, dtype = len(generator.shape.cameras), next(generator.parameters()).dtype
    images_b3HW, camids_b = to_unit(batch.images, dtype), batch.camids.cpu()
    places_bC2 = torch.zeros((len(camids_b), num_cameras, 2), dtype=torch.int64)
    for wanted in range(num_cameras):
        others = torch.nonzero(camids_b != wanted).flatten()
        if len(others):
            wanted_b = torch.full_like(others, wanted).to(images_b3HW.device)
            copies = to_pixels(generator(images_b3HW[others.to(images_b3HW.device)], wanted_b)).numpy()
            for at, copy in zip(others.tolist(), copies, strict=True):
                places_bC2[at, wanted, 0] = file.tell()
                places_bC2[at, wanted, 1] = file.write(encode(Image.fromarray(copy)))
    return places_bC2.flatten(1)


def _write_shard(folder: Path, split: SplitIndex, shard: int, places_nC2: np.ndarray) -> Written:
    """Write one shard as it was, but for the copies of training pictures."""
    start = sum(split.shard_samples[:shard])
    members = np.array(split.members[start : start + split.shard_samples[shard]])
    members["offset"] = members["length"] = 0
    partition = distributed.RowPartition(len(split), distributed.world_size())
    reader, path = ShardReader(), folder / split.shards[shard].name
    with ExitStack() as stack:
        tar = stack.enter_context(open_shard(path))
        ranks = range(distributed.world_size())
        files = [stack.enter_context(_file_of(folder, rank).open("rb")) for rank in ranks]
        for row, member in enumerate(members, start):
            pictures = {split.num_cameras: reader.read_batch(split, [row], [split.num_cameras])[0]}
            if split.name == "train":
                file = files[row // partition.rows_per_rank].fileno()
                places = enumerate(places_nC2[row].tolist())
                pictures |= {wanted: os.pread(file, length, offset) for wanted, (offset, length) in places if length}
            add_sample(tar, member, pictures, reader.read_about(split, row))
    reader.close()
    return ShardInfo(samples=len(members), **describe_file(path)), members


def _describe(index: ShardIndex, folder: Path, written: list[Written], made_of: str) -> None:
    """Write sidecars and index.json, as pack does; remove the copies' files."""
    about: dict[str, Any] = index.about | {"camera_style": "learnt", MADE_OF: made_of, "splits": {}}
    found = {info.name: (info, rows) for info, rows in written}
    for name, split in index.splits.items():
        shards = [found[shard.name] for shard in split.shards]
        sidecar = folder / f"{name}.members.npy"
        np.save(sidecar, np.concatenate([rows for _, rows in shards]), allow_pickle=False)
        missing = {"missing_styles": 0} if name == "train" else {}
        files = {"members": describe_file(sidecar), "shards": [asdict(info) for info, _ in shards]}
        about["splits"][name] = index.about["splits"][name] | missing | files
    for rank in range(distributed.world_size()):
        _file_of(folder, rank).unlink()
    write_index(folder, about)
