"""A trained backbone as a file that other programs run: ONNX or PT2 (torch.export).

The exported function takes normalised pictures (n, 3, H, W) float32, n free, and gives features (n, C) float32 of unit
length. A file's bytes are loaded again and checked before they are written. They name no folder of this machine.

Shape letters: n pictures, C feature length, H x W network input.
"""

import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ecn_dist.errors import UserError
from ecn_dist.files import check_name, write_atomically
from ecn_dist.models import Backbone, normalized_features

INPUT, OUTPUT = "images", "features"
FREE = {INPUT: {0: torch.export.Dim("n")}}  # any number of pictures
METADATA_FILE, METADATA_KEY = "ecn_dist.json", "ecn_dist"  # in PT2, and in the place that ONNX has for metadata
TRACED_BATCH = 2  # one that torch.export does not take for a constant
CHECKED_BATCHES = (1, 2, 5)
TOLERANCE = 1e-4  # in an entry of a feature of unit length; other kernels add up in another order

Metadata = dict[str, Any]
Run = Callable[[Tensor], Tensor]


class FeatureNetwork(nn.Module):
    """What is exported: backbone and normalising to unit length."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        # In parts, as the whole takes pictures that are normalised with ImageNet's mean; here it is the weights' own.
        self.backbone = nn.Sequential(OrderedDict(body=backbone.body, neck=backbone.neck))

    def forward(self, images: Tensor) -> Tensor:
        return normalized_features(self.backbone, images)


class Format(NamedTuple):
    """How a format is written, and how it is loaded again: to a function, with the metadata found in the file."""

    suffix: str
    write: Callable[[FeatureNetwork, Tensor, Metadata], bytes]
    load: Callable[[bytes], tuple[Run, Metadata]]


def describe(backbone: Backbone, height: int, width: int, fingerprint: str) -> Metadata:
    """The metadata of an export: all that a program needs to feed it."""
    return {
        "format": "ecn_dist export",
        "version": 1,
        "arch": backbone.arch,
        "model": fingerprint,
        "input": {
            "name": INPUT,
            "shape": ["n", 3, height, width],
            "dtype": "float32",
            "channels": "RGB",
            "resize": "whole picture to height x width, bicubic with antialiasing",
            "scale": "pixel values 0..255 divided by 255, then minus mean, divided by std",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        },
        "output": {
            "name": OUTPUT,
            "shape": ["n", backbone.num_features],
            "dtype": "float32",
            "length": "unit; compare by Euclidean distance or dot product",
        },
    }


def export(backbone: Backbone, kind: str, path: Path, metadata: Metadata) -> float:
    """Write `backbone` (on the CPU, evaluation mode; made float32) to `path`, complete and checked, or not at all.

    `kind` and `path` are those that `check_export` takes, `metadata` is that of `describe`. Returns the largest
    difference from the model in an entry of a feature. Raises `UserError` where the format cannot express this network,
    or the file does not compute what the model does.
    """
    form = FORMATS[kind]
    network = FeatureNetwork(backbone.float()).eval()
    shape = (max(CHECKED_BATCHES), *metadata["input"]["shape"][1:])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters about themselves; the check below is what counts
        try:
            data = form.write(network, images[:TRACED_BATCH], metadata)
        except Exception as error:  # exporters raise errors of their own, of many types, for what they cannot express
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            others = " or ".join(name for name in FORMATS if name != kind)
            raise UserError(f"--format {kind} cannot express {backbone.arch} ({reason}); try {others}") from error
        exported, found = form.load(data)
        if found != json.loads(json.dumps(metadata)):
            raise UserError(f"--format {kind}: the metadata did not come back from the file as they were written")
        difference = _largest_difference(network, images, exported, kind)
    write_atomically(path, data)
    return difference


def check_export(kind: str, path: Path) -> None:
    """Raise `UserError` where a format of `FORMATS` could not be written: wrong name, no folder, a package missing."""
    check_name(path, FORMATS[kind].suffix)
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if kind == "onnx" and missing:
        raise UserError(f"--format onnx needs {missing[0]}, which is not installed: pip install 'ecn_dist[export]'")


def _largest_difference(network: FeatureNetwork, images: Tensor, exported: Run, kind: str) -> float:
    differences = []
    for batch in CHECKED_BATCHES:
        expected, given = network(images[:batch]), exported(images[:batch])
        if given.shape != expected.shape:
            shapes = f"{tuple(given.shape)} for {tuple(expected.shape)}"
            raise UserError(f"--format {kind}: for {batch} pictures the file gives features {shapes}")
        differences.append((given - expected).abs().max())
    difference = torch.stack(differences).max().item()
    if not difference <= TOLERANCE:  # so written, NaN is too much
        raise UserError(
            f"--format {kind}: the file's features differ from the model's by {difference:.2g}, where rounding "
            f"explains {TOLERANCE:g}; it was not kept. Try another format"
        )
    return difference


def _write_pt2(network: FeatureNetwork, images: Tensor, metadata: Metadata) -> bytes:
    program = torch.export.export(network, (images,), dynamic_shapes=FREE)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    file = BytesIO()
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})
    return file.getvalue()


def _load_pt2(data: bytes) -> tuple[Run, Metadata]:
    extra = {METADATA_FILE: ""}
    program = torch.export.load(BytesIO(data), extra_files=extra)
    return program.module(), json.loads(extra[METADATA_FILE])


def _write_onnx(network: FeatureNetwork, images: Tensor, metadata: Metadata) -> bytes:
    program = torch.onnx.export(
        network, (images,), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=FREE
    )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # they name folders of this machine
    program.model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    program.model.producer_name, program.model.producer_version = "ecn_dist", version("ecn_dist")
    return program.model_proto.SerializeToString()


def _load_onnx(data: bytes) -> tuple[Run, Metadata]:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run([OUTPUT], {INPUT: images.numpy()})[0]))

    return run, json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])


FORMATS = {"onnx": Format(".onnx", _write_onnx, _load_onnx), "pt2": Format(".pt2", _write_pt2, _load_pt2)}
