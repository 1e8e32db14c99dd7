"""Weights, checkpoints, feature files, configurations and run folders: what commands make of damaged ones.

The truth is read anew, by safetensors, torch and PyYAML.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors.torch
import torch
import yaml
from torch import Tensor

from ecn_dist import config as configuration
from ecn_dist import report, search
from ecn_dist.styles.networks import GENERATOR, load_generator
from ecn_dist.training import building
from ecn_dist.training.checkpoint import META
from ecn_dist.training.run import Run, fingerprints
from ecn_dist.training.signals import StopRequest
from ecn_dist.training.trained import load_trained
from ecn_dist.training.trainer import Trainer
from tests.fuzz.harness import Place, ended
from tests.fuzz.material import METHODS, Material
from tests.fuzz.mutations import (
    HOSTILE_NUMBERS,
    HOSTILE_TEXTS,
    change_json,
    change_safetensors,
    change_text,
    damage,
    hostile,
)

CPU = torch.device("cpu")
_load_once, _parser_once = cache(search.Embedder.load), cache(configuration.build_parser)  # seconds in all


def make_weights(material: Material, rng: Random, place: Place) -> str:
    run = material.run(rng.choice(sorted(METHODS)))
    (place.input / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    data = (run / "weights.safetensors").read_bytes()
    if rng.random() < 0.6:
        (place.input / "weights.safetensors").write_bytes(change_safetensors(rng, data))
        return "safetensors"
    path = place.input / "weights.pt"
    torch.save(_other_tensors(rng, safetensors.torch.load(data)), path)
    if rng.random() < 0.7:
        path.write_bytes(damage(rng, path.read_bytes()))
    return "torch file"


def _other_tensors(rng: Random, tensors: dict[str, Tensor]) -> Any:
    """A state dict, perhaps wrapped, perhaps with one tensor of another kind."""
    key = rng.choice(sorted(tensors))
    tensor = tensors[key]
    kinds: tuple[Any, ...] = (
        tensor, tensor.double(), tensor.half(), tensor.bfloat16(), tensor.to(torch.int8), tensor.to(torch.complex64),
        tensor.to_sparse(), tensor[..., :0] if tensor.dim() else tensor, tensor * math.nan, "text", None, [tensor],
        tensor.unsqueeze(0), tensor.to("meta"), hostile(rng),
    )  # fmt: skip
    changed: dict[Any, Any] = tensors | {key: rng.choice(kinds)}
    if rng.random() < 0.2:
        changed[rng.choice((7, None, "module." + key, "x", ("a", 1)))] = tensor
    wrapped = rng.choice(("", "", "state_dict", "model"))
    return {wrapped: changed} if wrapped else rng.choice((changed, changed, changed, [changed], tensor, None))


def read_weights(place: Place) -> None:
    path = next(place.input.glob("weights.*"))
    with _configuration_read_once():
        found = ended(place, lambda: load_trained(path, CPU, place.input / "config.yaml"))
    if found.status == 0:
        plain = _plain_tensors(path)
        for key, tensor in found.value[0].state_dict().items():
            name = key.removeprefix("body.")
            if name in plain:
                assert torch.equal(tensor, plain[name].to(tensor.dtype)) or bool(tensor.isnan().any()), key
            else:
                assert name.endswith(("num_batches_tracked", ".p")), f"{key} is not in the file"


def _plain_tensors(path: Path) -> dict[str, Tensor]:
    is_safe = path.suffix == ".safetensors"
    content = safetensors.torch.load_file(path) if is_safe else torch.load(path, weights_only=True)
    for wrapper in ("state_dict", "model"):
        content = content if is_safe else content.get(wrapper, content)
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            for prefix in ("module.", "backbone.body.", "backbone."):
                key = key.removeprefix(prefix)
            tensors[key] = value
    return tensors


@contextmanager
def _configuration_read_once() -> Iterator[None]:
    """Most of the time would go into parsing configurations that no case changes."""
    load = configuration.load
    with patch.object(configuration, "load", lambda path: _parsed(load, path, path.read_bytes())):
        yield


@cache
def _parsed(load: Callable[[Path], configuration.Config], path: Path, content: bytes) -> configuration.Config:
    return load(path)


def make_checkpoint(material: Material, rng: Random, place: Place) -> str:
    method = rng.choice(sorted(METHODS))
    material.copy(material.run(method), place)
    (place.input / "weights.safetensors").unlink()  # so that the checkpoint is what is evaluated
    checkpoint = max((place.input / "checkpoints").iterdir())
    meta_file, file = checkpoint / META, next(checkpoint.glob("*.safetensors"))
    meta = json.loads(meta_file.read_bytes())
    if old := rng.random() < 0.2:  # as release 0.1 wrote them
        del meta["sha256"], meta["version"]
        meta_file.write_text(json.dumps(meta))
    kind = rng.choice(("meta", "meta", "meta", "header", "header", "values", "bytes", "file"))
    if kind == "meta":
        meta_file.write_bytes(change_json(rng, meta_file.read_bytes()))
    elif kind == "header":
        file.write_bytes(change_safetensors(rng, file.read_bytes()))
    elif kind == "values":
        file.write_bytes(_other_values(rng, file))
    elif kind == "bytes":
        file.write_bytes(damage(rng, file.read_bytes()))
    else:
        _other_file(rng, checkpoint, file)
    if kind in ("header", "values", "bytes") and rng.random() < 0.8:
        data = file.read_bytes()
        meta["files"][file.name] = len(data)
        if not old:
            meta["sha256"][file.name] = hashlib.sha256(data).hexdigest()
        meta_file.write_text(json.dumps(meta))
        kind += ", signed"
    return f"{method}, {kind}{', of 0.1' if old else ''}"


def _other_values(rng: Random, file: Path) -> bytes:
    with safetensors.safe_open(file, "pt") as opened:
        about, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    whole = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    key = rng.choice(whole if rng.random() < 0.6 else sorted(tensors))
    tensor = tensors[key].clone()
    if tensor.is_floating_point():
        tensors[key] = rng.choice((tensor * math.nan, tensor.double(), tensor.to(torch.int8), tensor * 1e30, -tensor))
    else:
        limits = torch.iinfo(tensor.dtype)
        value = rng.choice((-1, -2, 0, 1, 3, 1000, 2**31, limits.max, limits.min))
        tensor.view(-1)[rng.randrange(tensor.numel()) if rng.random() < 0.6 else slice(None)] = min(value, limits.max)
        tensors[key] = rng.choice((tensor, tensor, tensor.int(), tensor.double()))
    return safetensors.torch.save(tensors, about)


def _other_file(rng: Random, checkpoint: Path, file: Path) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        (checkpoint / rng.choice(("x.safetensors", "a\x1b[2J.safetensors"))).write_bytes(file.read_bytes())
    elif kind == 2:
        file.unlink()
        file.symlink_to(rng.choice((Path("/dev/zero"), file, checkpoint)))
    elif kind == 3:
        (checkpoint / META).unlink()
    else:
        checkpoint.rename(
            checkpoint.with_name(rng.choice(("step-99999999", "step-00000000", "step-x", "step-000000001")))
        )


@cache
def _run_of(place_root: Path, method: str, shards: Path) -> Any:
    """Configuration and domains of the runs that continue; they are the same in all cases."""
    stored = configuration.load(shards.parent / method / "config.yaml")
    domains = building.open_domains(stored)
    return stored, domains, fingerprints(domains)


def read_checkpoint(material: Material, place: Place) -> None:
    method = yaml.safe_load((place.input / "config.yaml").read_text())["method"]
    stored, domains, data = _run_of(place.root, method, material.shards)
    config = replace(stored, output_dir=str(place.input))
    if place.thorough:
        with _configuration_read_once():
            ended(place, lambda: load_trained(place.input, CPU))

    def resume() -> tuple[Trainer, Path] | None:
        checkpoint = Run(config, data, "cpu").checkpoint()
        if checkpoint is None:
            return None
        trainer = building.build_trainer(config, domains, CPU, place.output)
        trainer.resume(checkpoint)
        return trainer, checkpoint

    found = ended(place, resume)
    if found.status == 0 and found.value is not None:
        trainer, checkpoint = found.value
        meta = json.loads((checkpoint / META).read_bytes())
        assert (trainer.step, trainer.skipped_steps) == (meta["step"], meta.get("skipped_steps", 0))
        plain = safetensors.torch.load_file(next(checkpoint.glob("*.safetensors")))
        for key, tensor in trainer._state().items():
            assert torch.equal(tensor.view(-1), plain[key].view(-1)) or bool(tensor.isnan().any()), key
        if place.thorough and trainer.step < trainer.timeline.total_steps:
            ended(place, lambda: trainer.fit(StopRequest()) and None)


def make_features(material: Material, rng: Random, place: Place) -> str:
    path = place.input / "gallery.safetensors"
    path.write_bytes(change_safetensors(rng, material.features.read_bytes()))
    return "features"


def read_features(material: Material, place: Place) -> None:
    path, query = place.input / "gallery.safetensors", sorted((material.root / "market/query").iterdir())[0]
    common = ["--query", str(query), "--gallery", str(path), "--checkpoint", str(material.run("ecn"))]
    with patch.object(search.Embedder, "load", _load_once):
        found = ended(place, lambda: search.main([*common, "--device", "cpu", "--top", "3"]))
    if found.status:
        return
    with safetensors.safe_open(path, "np") as file:
        names, features = json.loads(file.metadata()["files"]), file.get_tensor("features")
    lines = [line.split("  ", 3) for line in found.text.splitlines()[1:]]
    assert len(lines) == min(3, len(names)), found.text
    own = safetensors.torch.load_file(material.features)["features"][0].numpy()  # the query is the first picture
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    order = np.argsort(np.linalg.norm(unit - own, axis=1), kind="stable")
    for line, row in zip(found.text.splitlines()[1:], order, strict=False):
        distance = float(line.split()[1])
        assert abs(distance - np.linalg.norm(unit[row] - own)) < 2e-3, (line, row)


def make_generator(material: Material, rng: Random, place: Place) -> str:
    (place.input / GENERATOR).write_bytes(change_safetensors(rng, material.generator.read_bytes()))
    return "generator"


def read_generator(place: Place) -> None:
    path = place.input / GENERATOR
    found = ended(place, lambda: load_generator(path))
    if found.status == 0:
        plain = safetensors.torch.load_file(path)
        for key, tensor in found.value.state_dict().items():
            assert torch.equal(tensor, plain[key]) or bool(tensor.isnan().any()), key


def make_config(material: Material, rng: Random, place: Place) -> str:
    path = material.run(rng.choice(sorted(METHODS))) / "config.yaml"
    text = path.read_text()
    words = [part for line in text.splitlines() for part in line.replace(":", " ").split()]

    def word() -> str:
        value = rng.choice((*HOSTILE_TEXTS, *map(repr, HOSTILE_NUMBERS[:-1]), *words))
        return value if rng.random() < 0.7 else json.dumps(hostile(rng))

    (place.input / "config.yaml").write_bytes(change_text(rng, text, word))
    return "configuration"


def read_config(material: Material, place: Place) -> None:
    path = place.input / "config.yaml"

    with patch.object(configuration, "build_parser", _parser_once):
        if place.thorough:
            run = material.run("ecn")  # whose weights may not fit what the file says of the network
            ended(place, lambda: load_trained(run, CPU, path), beside=run / "weights.safetensors")
        found = ended(place, lambda: configuration.load(path))
    # Options of a command line may be among those that are checked, so no file is named.
    if found.status or ended(place, lambda: found.value.check(), named=False).status:
        return
    options = configuration.flatten(found.value)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in given.items():
        for name, inner in value.items() if isinstance(value, dict) else [("", value)]:
            has = options[f"{key}.{name}" if name else key]
            assert _says(inner, has), f"{key}.{name}: {inner!r} became {has!r}"
    again = yaml.safe_load(configuration.dump(found.value))
    assert again == configuration._sections(found.value), "what is stored is not what is read back"


def _says(given: Any, has: Any) -> bool:
    """Whether an option is what its YAML says."""
    if isinstance(given, str) and isinstance(has, float | int) and not isinstance(has, bool):
        return float(given) == has  # YAML 1.1 takes 1e-3 for a text
    same = type(given) is type(has) or (type(given) is int and isinstance(has, float))
    return same and given == has


FINDINGS = {
    "first_answers": {"num_wrong": 30, "num_wrong_own_camera": 20, "own_camera_share": 0.3, "num_queries": 50},
    "weakest_camera_pairs": [{"query_camera": "c1", "gallery_camera": "c2", "value": 0.2}],
}
COMPARISON = {
    "rows": {"full": [{"mAP": 0.5, "rank1": 0.7}, {"mAP": 0.4}], "base": [{"mAP": 0.1}]},
    "title": "t",
    "note": "",
}


def make_run(material: Material, rng: Random, place: Place) -> str:
    run = material.run("ecn")
    names = ["summary.json", "config.yaml", "findings.json", "comparison.json"]
    if place.thorough:
        names.append("metrics.jsonl")  # whose curves take long to draw
    contents = {name: (run / name).read_bytes() for name in names if (run / name).is_file()}
    contents |= {"findings.json": json.dumps(FINDINGS).encode(), "comparison.json": json.dumps(COMPARISON).encode()}
    name = rng.choice(names)
    data = contents[name]
    if name == "metrics.jsonl":
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = change_json(rng, lines[at])
        contents[name] = b"\n".join(lines) + b"\n"
    else:
        contents[name] = damage(rng, data) if name == "config.yaml" else change_json(rng, data)
    (place.input / "figures").mkdir()
    for each, content in contents.items():
        (place.input / ("figures" if each == "findings.json" else ".") / each).write_bytes(content)
    return name


def read_run(place: Place) -> None:
    output = place.output / "report.html"
    found = ended(place, lambda: report.main(["--run", str(place.input), "--output", str(output)]))
    page = output.read_text(encoding="utf-8") if found.status == 0 else ""
    assert not found.status or not output.exists()
    assert "<script" not in page
    assert "\x1b" not in page
