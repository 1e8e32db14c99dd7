"""Shard folders and pictures: what validate says, and what the streams deliver, of damaged ones.

The truth is read anew, by NumPy, Pillow and slices of bytes.
"""

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ecn_dist import label, validate
from ecn_dist.data import EvaluationStream, ShardIndex, TrainStream, pictures, reader, transforms
from ecn_dist.data.cache import ShardCache
from ecn_dist.data.fetch import Patience
from ecn_dist.data.plan import PassPlan
from ecn_dist.data.reader import check_shards
from ecn_dist.errors import UserError
from ecn_dist.reporting import model_card
from tests.fuzz.harness import Place, ended
from tests.fuzz.material import HEIGHT, WIDTH, Material
from tests.fuzz.mutations import change_json, change_tar, damage

FIELDS = ("pid", "camid", "index")
PIPE_NAMES = r"(index\.json|(train|query|gallery)(-[0-9]{6,12}\.tar|\.members\.npy))"


def make_shards(material: Material, rng: Random, place: Place) -> str:
    material.copy(material.shards, place)
    kind = rng.choice(
        ("index", "index", "index", "sidecar", "sidecar", "tar", "tar", "tar", "picture", "bytes", "file")
    )
    if kind == "index":
        _change_index(rng, place.input)
    elif kind == "sidecar":
        _change_sidecar(rng, place.input)
    elif kind in ("tar", "picture"):
        _change_shard(rng, place.input, kind)
    elif kind == "bytes":
        path = rng.choice(sorted(place.input.iterdir()))
        path.write_bytes(damage(rng, path.read_bytes()))
    else:
        _change_file(rng, place.input)
    if kind not in ("index", "file") and rng.random() < 0.7:
        sign(place.input)
        kind += ", signed"
    if rng.random() < 0.1:
        place.commands = rf"cat {place.input}/{PIPE_NAMES}"
        kind += ", through a pipe"
    return kind


def _change_index(rng: Random, folder: Path) -> None:
    path = folder / "index.json"
    path.write_bytes(change_json(rng, path.read_bytes()))


def _change_sidecar(rng: Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.npy")))
    if rng.random() < 0.3:
        path.write_bytes(damage(rng, path.read_bytes()))
        return
    members = np.load(path)
    for _ in range(rng.choice((1, 1, 2))):
        column, row = rng.choice(members.dtype.names or ()), rng.randrange(len(members))
        limits = np.iinfo(members[column].dtype)
        near = int(members[column][row].flat[0]) + rng.choice((-1, 1, -512, 512))
        value = rng.choice((0, 1, -1, 2, near, limits.max, limits.min, int(members[column].flat[0])))
        cells = members[column][row : row + 1].reshape(-1)
        cells[rng.randrange(len(cells))] = value
        members[column][row] = cells.reshape(members[column][row].shape)
    if rng.random() < 0.2:
        rng.choice((lambda: np.random.default_rng(rng.randrange(9)).shuffle(members), lambda: members.sort()))()
    np.save(path, members)


def _change_shard(rng: Random, folder: Path, kind: str) -> None:
    path = rng.choice(sorted(folder.glob("*.tar")))
    data = bytearray(path.read_bytes())
    if kind == "tar":
        path.write_bytes(change_tar(rng, bytes(data)))
        if rng.random() < 0.4:
            _find_members_again(folder, path)
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = rng.choice([info for info in tar if info.name.endswith(".jpg") or rng.random() < 0.2])
    place = slice(member.offset_data, member.offset_data + member.size)
    content = damage(rng, bytes(data[place])) if rng.random() < 0.7 else _odd_picture(rng)
    data[place] = content[: member.size].ljust(member.size, b"\0")
    path.write_bytes(data)


def _odd_picture(rng: Random) -> bytes:
    """A picture that is none, or small, or in another format."""
    image = Image.fromarray(np.frombuffer(rng.randbytes(3 * 6 * 4), dtype=np.uint8).reshape(6, 4, 3))
    kind = rng.choice(("PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "ICO", "EPS"))
    if rng.random() < 0.2:
        image = image.resize(rng.choice(((1, 1), (1, 30), (2, 2))))
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def _find_members_again(folder: Path, path: Path) -> None:
    """Let the sidecar's rows point where the members of a changed archive are now, as far as it can be read."""
    split, number = path.stem.split("-")
    sidecar = folder / f"{split}.members.npy"
    members = np.load(sidecar)
    try:
        with tarfile.open(path) as tar:
            found = {info.name: info for info in tar}
    except (tarfile.TarError, ValueError, OSError, EOFError, OverflowError):
        return
    cameras = members["offset"].shape[1] - 1
    for row in np.flatnonzero(members["shard"] == int(number)):
        key = f"{members['index'][row]:08d}"
        if info := found.get(f"{key}.json"):
            members["json_offset"][row], members["json_length"][row] = info.offset_data, min(info.size, 2**31 - 1)
        for slot in range(cameras + 1):
            if info := found.get(f"{key}.jpg" if slot == cameras else f"{key}.cam{slot:02d}.jpg"):
                members["offset"][row, slot], members["length"][row, slot] = info.offset_data, min(info.size, 2**31 - 1)
    np.save(sidecar, members)


def _change_file(rng: Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    kind = rng.randrange(5)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(rng.choice((path, Path("/dev/zero"), folder, Path("nowhere"))))
    elif kind == 3:
        path.write_bytes(b"")
    elif kind == 4:
        path.with_name(path.name + rng.choice(("x", "\x1b[2J", "\n", ".tar", "\udcff.tar"))).write_bytes(b"x")


def sign(folder: Path) -> None:
    """Let index.json announce the sizes and checksums of the files as they are now."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
        for split in index["splits"].values():
            for about in (split["members"], *split["shards"]):
                data = (folder / about["name"]).read_bytes()
                about |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_text(json.dumps(index))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # the index itself is damaged


def read_shards(place: Place) -> None:
    folder = str(place.input)
    address = f"pipe:cat {folder}/{{}}" if place.commands else folder
    # Validation waits for a source that fails, as long as a person would; the streams are told not to.
    sound = (
        None if place.commands else ended(place, lambda: validate.main([folder, "--workers", "1"]), statuses=(0, 1, 2))
    )
    streams = ended(place, lambda: _stream(address, place))
    if sound is not None and sound.status == 0:
        assert streams.status == 0, f"validate says that it is sound, and reading ends with {streams.text}"
    if streams.status == 0:
        for name, batches in streams.value.items():
            _check(place.input, name, batches)


def _stream(address: str, place: Place) -> dict[str, list[Any]]:
    patience = Patience(attempts=1, stall_seconds=5)
    index = ShardIndex.load(address, patience)
    cache = ShardCache(place.root / "cache", 1 << 24, patience) if place.commands else None
    splits = {name: index.split(name) for name in index.splits}
    check_shards(*splits.values())
    json.dumps(model_card.describe_data(index))
    found: dict[str, list[Any]] = {}
    for name, split in splits.items():
        stream = EvaluationStream(
            split, height=HEIGHT, width=WIDTH, batch_size=5, style="all" if split.has_styles else "real", cache=cache
        )
        found[name] = list(stream)
        names = reader.ShardReader(cache).read_file_names(split, range(len(split)))
        label._write(place.output / f"{name}.csv", split, np.arange(len(split)) % 3 - 1, names)
    if "train" in splits:
        split = splits["train"]
        try:
            labels = split.labels
        except UserError:
            labels = None  # not all identities are known
        if len(split) >= 4:
            plan = PassPlan(split.shard_samples, 4, 2, 0, "target", labels=labels)
            style = "random" if split.has_styles else "real"
            stream = TrainStream(split, plan, height=HEIGHT, width=WIDTH, style=style, cache=cache)
            for batch in stream.batches(0, 2):
                rows = np.searchsorted(np.sort(split.indices), batch.indices.numpy())
                assert labels is None or _labels_fit(split, rows, batch)
    return found


def _labels_fit(split: Any, rows: np.ndarray, batch: Any) -> bool:
    pids = np.asarray(split.identities)[batch.labels.numpy()]
    return bool((pids == batch.pids.numpy()).all())


def _check(folder: Path, name: str, batches: list[Any]) -> None:
    """Each picture of a split, in stored order, is what the files say by themselves."""
    index = json.loads((folder / "index.json").read_bytes())
    members, shards = np.load(folder / f"{name}.members.npy"), index["splits"][name]["shards"]
    cameras = index["num_cameras"]
    views = cameras if len(members) < sum(len(batch.pids) for batch in batches) else 1
    told = {field: torch.cat([getattr(batch, f"{field}s" if field != "index" else "indices") for batch in batches])
            for field in FIELDS}  # fmt: skip
    for field in FIELDS:
        assert told[field].tolist() == members[field].repeat(views).tolist(), f"{field} of {name}"
    images = torch.cat([batch.images for batch in batches])
    with (folder.parent / "output" / f"{name}.csv").open(encoding="utf-8", newline="") as table:
        listed = {row["file"] for row in csv.DictReader(table)}
    for at, row in enumerate(members):
        slots = [cameras, *(camera for camera in range(cameras) if camera != row["camid"])][:views]
        data = (folder / shards[row["shard"]]["name"]).read_bytes()
        about = json.loads(data[row["json_offset"] : row["json_offset"] + row["json_length"]])
        assert about["file"].encode(errors="backslashreplace").decode() in listed, f"name of {at} of {name}"
        for view, slot in enumerate(slots):
            start = row["offset"][slot]
            pixels = torch.empty((1, HEIGHT, WIDTH, 3), dtype=torch.uint8)
            transforms.resize_into(pixels[0], plain_pixels(data[start : start + row["length"][slot]]))
            expected = transforms.normalise_and_erase(pixels)[0]
            assert torch.equal(images[at * views + view], expected), f"picture {at}, view {view} of {name}"


def plain_pixels(data: bytes) -> np.ndarray:
    """(h, w, 3) of a picture by Pillow alone."""
    with Image.open(io.BytesIO(data), formats=pictures.FORMATS) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if image.mode in pictures.WIDE_GREY or (image.mode == "I" and image.format in pictures.FORMATS_OF_WIDE_GREY):
            return np.array(Image.fromarray(np.round(np.asarray(upright, float) / 257).astype(np.uint8)).convert("RGB"))
        return np.array(upright.convert("RGB"))


def make_picture(material: Material, rng: Random, place: Place) -> str:
    path = rng.choice(material.pictures)
    data = path.read_bytes()
    if rng.random() < 0.1:
        data = _odd_picture(rng)
    (place.input / path.name).write_bytes(damage(rng, data))
    return path.name


def read_a_picture(place: Place) -> None:
    path = next(place.input.iterdir())
    data = path.read_bytes()

    def read() -> tuple[np.ndarray, bytes, Image.Image] | None:
        try:
            return reader.decode(data), *pictures.as_stored(data, (16, 16))
        except pictures.UnreadablePicture as error:
            raise UserError(f"{path}: {error}") from error

    found = ended(place, read)
    if found.status == 0:
        pixels, stored, image = found.value
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, plain_pixels(data)), "pixels are not Pillow's"
        assert max(image.height, image.width) <= 16
        assert np.array_equal(plain_pixels(stored).shape, np.asarray(image).shape)
