"""Weights in and out of the network: torchvision's, a file's, an export's.

A file holds plain tensors, as safetensors or as a torch file (read with `weights_only=True`). Backbone keys have
torchvision's names (`conv1.weight`, `layer1.0...`); the rest of a whole network is `embedding.*` and heads, `*_head.*`.
Checkpoints of other programs are read too (foreign.py).
"""

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision import models

from ecn_dist.errors import UserError
from ecn_dist.files import write_atomically
from ecn_dist.models.backbones import BATCH_COUNT, IMAGENET_MEAN, IMAGENET_STD, Backbone
from ecn_dist.models.foreign import UNREADABLE, Origin, read_file, with_origin
from ecn_dist.models.layers import GeM
from ecn_dist.models.timm_networks import TIMM, fit_to_input

_NECK = "neck."
_WRAPPERS = ("teacher", "state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "backbone.body.", "backbone.")
_CLASSIFIER_KEYS = ("fc.", "classifier.", "heads.", "head.")
_MADE_ANEW = ("relative_position_index", "attn_mask")  # of windows, by each network for its own input


def load_weights(network: nn.Module, weights: str) -> list[str]:
    """Fill `network` from `weights`: `imagenet`, `none`, or a file.

    Returns notes on what was left at random initialisation. Raises `UserError` for a file that is missing, unreadable,
    or does not fit. `imagenet` is read from torch's cache; nothing is fetched.
    """
    if weights == "none":
        return []
    backbone = network.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    tensors, origin = _read(weights, backbone.arch)
    _fill_backbone(backbone, tensors, weights, origin)
    _check_normalisation(backbone, weights, origin)
    return _fill_heads(network, tensors, weights)


def load_backbone(backbone: Backbone, weights: str) -> None:
    """Fill the backbone alone, its neck included, as `load_weights` does; what else the file holds is left alone."""
    tensors, origin = _read(weights, backbone.arch)
    if backbone.neck.state_dict() and f"{_NECK}weight" not in tensors:
        raise UserError(f"model.weights: {weights} has no neck, and method cluster compares pictures by it")
    _fill_backbone(backbone, tensors, weights, origin)


def export_weights(network: nn.Module, path: Path) -> None:
    """Write the whole network as one safetensors file, the backbone under its library's names; atomically.

    The mean and deviation of its pictures are in the file's metadata.
    """
    backbone = network.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    named = network.state_dict().items()
    tensors = {key.removeprefix("backbone.body."): tensor.detach().cpu().contiguous() for key, tensor in named}
    about = {"arch": backbone.arch, "mean": backbone.mean, "std": backbone.std}
    # One entry: safetensors writes several in any order, and equal networks are to give equal files.
    write_atomically(path, save(tensors, {"network": json.dumps(about)}))  # `save_file` lets nobody else read the file


def weights_file(weights: str, arch: str) -> Path:
    """The file that `model.weights` means. Raises `UserError` where it is not there; nothing is fetched."""
    if weights.startswith(("http://", "https://")):
        raise UserError("model.weights: is an address, and nothing is downloaded; name a file that was fetched from it")
    path = _cached_imagenet(arch) if weights == "imagenet" else Path(weights)
    if not path.is_file():
        raise UserError(f"model.weights: there is no file {path}; it takes imagenet, none, or a file of tensors")
    return path


def _read(weights: str, arch: str) -> tuple[dict[str, Tensor], Origin | None]:
    path = weights_file(weights, arch)
    if path.suffix != ".safetensors":
        return _strip(read_file(path, "model.weights"), str(path))
    try:
        path.open("rb").close()  # what may not be read is "no such file" to safetensors
    except OSError as error:
        raise UserError(f"model.weights: {path} cannot be read ({error.strerror}); correct its rights") from error
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("network", "{}"))
        tensors, origin = _strip(load_file(path), str(path))
        if isinstance(about, dict) and {"mean", "std"} <= about.keys():
            mean, std = (_of_three_channels(about[key]) for key in ("mean", "std"))
            origin = Origin("its run", mean, std, about.get("arch", arch))
    except (SafetensorError, *UNREADABLE, OSError) as error:
        raise UserError(f"model.weights: {path} cannot be read as a file of plain tensors ({error})") from error
    return tensors, origin


def _of_three_channels(values: Any) -> tuple[float, ...]:
    if type(values) is not list or len(values) != 3 or any(type(x) not in (int, float) or x != x for x in values):
        raise ValueError(f"mean or std in its metadata is {str(values)[:99]!r}")
    return tuple(values)


def _check_normalisation(backbone: Backbone, weights: str, origin: Origin | None) -> None:
    """Weights made with another mean than ImageNet's are not taken without a word about it."""
    usual = getattr(backbone.body, "pretrained_cfg", None) or {}  # of timm's networks
    if origin is None and backbone.arch.startswith(TIMM) and usual.get("mean") and usual.get("std"):
        who = f"weights of timm for {backbone.arch}, mostly"
        origin = Origin(who, tuple(usual["mean"]), tuple(usual["std"]), backbone.arch)
    if backbone.normalisation_given or not origin or (origin.mean, origin.std) == (IMAGENET_MEAN, IMAGENET_STD):
        return
    mean, std = list(origin.mean), list(origin.std)
    raise UserError(
        f"model.mean: pictures for {weights} are normalised with mean {mean} and deviation {std}, as far as its names "
        f"tell ({origin.name}), and not with ImageNet's; say so: --model.mean '{mean}' --model.std '{std}' (or give "
        f"ImageNet's: {list(IMAGENET_MEAN)}, {list(IMAGENET_STD)})"
    )


def _imagenet_url(arch: str) -> str | None:
    try:
        return models.get_model_weights(arch)["IMAGENET1K_V1"].url
    except (ValueError, KeyError):
        return None


def _cached_imagenet(arch: str) -> Path:
    if (url := _imagenet_url(arch)) is None:
        raise UserError(f"model.weights: there are no ImageNet weights for {arch}; give a file, or none")
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        raise UserError(
            f"model.weights: the ImageNet weights of {arch} are not at {path}, and nothing is downloaded; "
            f"fetch them, on every host or with TORCH_HOME on a shared one: curl --create-dirs -o '{path}' {url}"
        )
    return path


def _strip(content: Any, weights: str) -> tuple[dict[str, Tensor], Origin | None]:
    """The tensors of a state dict, out of the usual wrappings; a `UserError` where they are not plain ones by name."""
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        held = f"{weights} holds a {type(content).__name__}, where a state dict, of tensors by name, is needed"
        raise UserError(f"model.weights: {held}; write it with torch.save(network.state_dict(), ...)")
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor) and not key.endswith(_MADE_ANEW):
            for prefix in _PREFIXES:
                key = key.removeprefix(prefix)
            tensors[key] = value
    try:
        tensors, origin = with_origin(tensors)
    except UNREADABLE as error:
        raise UserError(f"model.weights: {weights} has known names for tensors of unknown shapes ({error})") from error
    for key, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not dense or not (tensor.is_floating_point() or key.endswith(BATCH_COUNT)) or tensor.itemsize < 2:
            kind = f"{tensor.layout} tensor of {tensor.dtype} on {tensor.device}".replace("torch.", "")
            raise UserError(
                f"model.weights: {key} in {weights} is a {kind}, where dense floating point numbers of at least 16 "
                "bits are needed; convert the file"
            )
    return tensors, origin


def _fill_backbone(backbone: Backbone, tensors: dict[str, Tensor], weights: str, origin: Origin | None) -> None:
    if backbone.arch.startswith(TIMM):
        try:
            tensors = fit_to_input(backbone.body, tensors)
        except UNREADABLE as error:
            raise UserError(f"model.weights: {weights} cannot be fitted to {backbone.arch} ({error})") from error
    has_neck, state = any(key.startswith(_NECK) for key in tensors), backbone.state_dict()
    # Other programs' files know no neck, and no pooling with a trained power: these then start as they are.
    names = {key.removeprefix("body."): key for key in state if has_neck or not key.startswith(_NECK)}
    powers = {f"{name}.p" for name, module in backbone.body.named_modules() if isinstance(module, GeM)}
    missing = [key for key in names if key not in tensors and not key.endswith(BATCH_COUNT) and key not in powers]
    others = (*_CLASSIFIER_KEYS, _NECK)
    unexpected = [key for key in tensors if key not in names and not key.startswith(others) and not _head(key)]
    of_another_shape = _other_shapes(tensors, {key: state[name] for key, name in names.items()})
    found = {"missing": missing, "unexpected": unexpected, "of another shape": of_another_shape}
    problems = [
        f"{what}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in found.items()
        if keys
    ]
    if problems:
        raise UserError(
            f"model.weights: {weights} does not fit {backbone.arch} ({'; '.join(problems)}); "
            "set model.arch and model.pooling to those the file was made with"
            + (f" ({origin.name}: such as {origin.arch})" if origin else "")
        )
    backbone.load_state_dict({name: tensors[key] for key, name in names.items() if key in tensors}, strict=False)


def _fill_heads(network: nn.Module, tensors: dict[str, Tensor], weights: str) -> list[str]:
    notes = []
    for name in dict.fromkeys(filter(None, map(_head, tensors))):
        part, prefix = getattr(network, name, None), f"{name}."
        if part is None:
            continue
        given = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        wanted = part.state_dict()
        differing = ", ".join(_other_shapes(given, wanted))
        if given.keys() == wanted.keys() and not differing:
            part.load_state_dict(given)
        else:
            notes.append(f"{weights}: {prefix}* does not fit ({differing}) and starts at random")
    return notes


def _head(key: str) -> str:
    """The part of a whole network beside its backbone that `key` names; empty for another key."""
    name = key.partition(".")[0]
    return name if name == "embedding" or name.endswith("_head") else ""


def _other_shapes(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    shapes = {key: (tuple(given[key].shape), tuple(wanted[key].shape)) for key in wanted if key in given}
    return [f"{key} {has} for {needs}" for key, (has, needs) in shapes.items() if has != needs]
