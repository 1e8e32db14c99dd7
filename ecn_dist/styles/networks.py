"""Generator and discriminator of camera styles (Choi et al., "StarGAN", CVPR 2018), and the generator's file.

b pictures, H x W pixels, C cameras. Pictures are in -1..1.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ecn_dist.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ecn_dist.errors import UserError
from ecn_dist.files import write_atomically

FORMAT = "ecn_dist camera styles"
GENERATOR = "generator.safetensors"
MAX_HALVINGS = 6  # of the discriminator: at 256 x 128
SLOPE = 0.01
NEARLY_1 = 0.99  # tanh never gives black or white


@dataclass(frozen=True)
class Shape:
    """What decides a generator's tensors, and the size of the pictures it was trained on."""

    cameras: tuple[str, ...]  # names in the data set: camid = position
    height: int
    width: int
    channels: int = 64  # of the first convolution; four times as many in the residual blocks
    blocks: int = 6
    skip: bool = False  # the layers give a change of the picture, not a new one


def to_unit(images_b3HW: Tensor, dtype: torch.dtype) -> Tensor:
    """A stream's normalised pictures in -1..1."""
    mean_3, std_3 = (
        torch.tensor(three, dtype=dtype, device=images_b3HW.device).view(3, 1, 1)
        for three in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images_b3HW.to(dtype) * std_3 + mean_3) * 2 - 1


def to_pixels(images_b3HW: Tensor) -> Tensor:
    """(b, H, W, 3) uint8 on the CPU."""
    return ((images_b3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)
    return [convolution, nn.InstanceNorm2d(outputs, affine=True), nn.ReLU()]


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_layer(channels, channels, 3), *_layer(channels, channels, 3)[:2])

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


class Generator(nn.Module):
    """A picture as another camera would have taken it.

    7x7 convolution, two of stride 2, residual blocks, two of nearest-neighbour upsampling and convolution (a transposed
    convolution leaves checkerboards), 7x7 convolution, tanh. Each with instance norm, so that a picture's copy does not
    depend on the batch it came in. Sides must be multiples of 4.

    Instance norm takes a picture's own brightness and cast away, and the layers must make colours up again. With `skip`
    (which is not in the paper) the picture is added before tanh, in tanh's own scale, so that a network that gives
    nothing gives the picture.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        w = shape.channels
        layers = _layer(3 + len(shape.cameras), w, 7) + _layer(w, 2 * w, 4, 2) + _layer(2 * w, 4 * w, 4, 2)
        layers += [_Residual(4 * w) for _ in range(shape.blocks)]
        for channels in (4 * w, 2 * w):
            layers += [nn.Upsample(scale_factor=2), *_layer(channels, channels // 2, 3)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(w, 3, 7, padding=3, bias=False))

    def forward(self, images_b3HW: Tensor, camids_b: Tensor) -> Tensor:
        """(b, 3, H, W) in the style of the wanted cameras (b,) int64."""
        wanted_bC = F.one_hot(camids_b, len(self.shape.cameras)).to(images_b3HW.dtype)
        maps_bCHW = wanted_bC[:, :, None, None].expand(-1, -1, *images_b3HW.shape[2:])
        made_b3HW = self.layers(torch.cat([images_b3HW, maps_bCHW], dim=1))
        if self.shape.skip:
            made_b3HW = made_b3HW + torch.atanh(images_b3HW * NEARLY_1)
        return torch.tanh(made_b3HW)


class Discriminator(nn.Module):
    """Is each patch real, and which camera took the picture? Halved until its shorter side is 2, or six times."""

    def __init__(self, num_cameras: int, height: int, width: int, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for halving in range(max(1, min(MAX_HALVINGS, min(height, width).bit_length() - 2))):
            outputs = channels << halving
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(SLOPE)]
            inputs, height, width = outputs, height // 2, width // 2
        self.layers = nn.Sequential(*layers)
        self.patches = nn.Conv2d(inputs, 1, 3, padding=1, bias=False)
        self.camera = nn.Conv2d(inputs, num_cameras, (height, width), bias=False)

    def forward(self, images_b3HW: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 1, h, w) how real each patch is, unbounded; (b, C) logits of the camera."""
        features = self.layers(images_b3HW)
        return self.patches(features), self.camera(features).flatten(1)


def is_finite(network: nn.Module) -> bool:
    """Whether all tensors of a network are numbers."""
    return all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())


def save_generator(generator: Generator, path: Path) -> None:
    """Write the generator as safetensors; its card stands in the file's meta data (`format`, `shape` as JSON)."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in generator.state_dict().items()}
    write_atomically(path, save(tensors, {"format": FORMAT, "shape": json.dumps(asdict(generator.shape))}))


def _check(shape: Shape) -> None:
    """`ValueError` for what no generator has; the file may come from anybody."""
    limits = {"height": (8, 2048), "width": (8, 2048), "channels": (1, 1024), "blocks": (0, 64)}
    for name, (least, most) in limits.items():
        if type(value := getattr(shape, name)) is not int or not least <= value <= most:
            raise ValueError(f"its {name} is {value!r:.99}")
    if shape.height % 4 or shape.width % 4:
        raise ValueError(f"its pictures are of {shape.height} x {shape.width}, no multiples of 4")
    if type(shape.skip) is not bool or not shape.cameras or not all(type(name) is str for name in shape.cameras):
        raise ValueError("its cameras or its skip are none")


def load_generator(path: Path) -> Generator:
    """The generator of a file that `save_generator` wrote. `UserError` where it is none, or is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise UserError(f"{path} is no generator of camera styles; name the {GENERATOR} of a `stylize` run")
            given = json.loads(about["shape"])
            shape = Shape(**given | {"cameras": tuple(given["cameras"])})
            _check(shape)
            with torch.device("meta"):  # no memory is taken for what the file does not hold
                wanted = {name: list(tensor.shape) for name, tensor in Generator(shape).state_dict().items()}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            if {name: part.get_shape() for name, part in slices.items() if part.get_dtype() == "F32"} != wanted:
                raise ValueError("its tensors are not of its shape")
            generator = Generator(shape)
            generator.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            if not is_finite(generator):
                raise ValueError("its tensors are not finite")
    except OSError as error:  # safetensors names no file
        raise UserError(f"{path} cannot be read ({error}); name the {GENERATOR} of a `stylize` run") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again, or train another") from error
    return generator
