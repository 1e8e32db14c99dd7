"""Shapes, pixels and files of the networks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ecn_dist.data.transforms import normalise_and_erase
from ecn_dist.errors import UserError
from ecn_dist.styles.networks import Discriminator, Generator, Shape, load_generator, save_generator, to_pixels, to_unit

SHAPE = Shape(("3", "7"), 16, 8, channels=4, blocks=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("channels", value) for value in (1024, 10**9, 0, -1, "4", 4.0, True)),
        *(("blocks", value) for value in (10**9, -1, None)),
        *(("height", value) for value in (2**40, 0, "8")),
        *(("cameras", value) for value in ([], [1, 2], 7, "", ["a"] * 9)),
        ("skip", "yes"),
        ("more", 1),
    ],
)
def test_a_shape_that_is_not_the_files_takes_no_memory(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(Generator(Shape(("c1", "c2"), 8, 8, 4, 1)), path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shape = json.loads(about["shape"]) | {key: value}
    save_file(tensors, path, about | {"shape": json.dumps(shape)})
    with pytest.raises(UserError, match=r"generator\.safetensors is damaged"):
        load_generator(path)


def test_a_copy_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    generator = Generator(SHAPE).double()
    images, wanted = torch.rand(3, 3, 16, 8, dtype=torch.float64) * 2 - 1, torch.tensor([1, 0, 1])
    copies = generator(images, wanted)
    assert copies.shape == images.shape
    assert copies.abs().max() < 1
    torch.testing.assert_close(generator(images[1:2], wanted[1:2]), copies[1:2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(generator(images, 1 - wanted), copies)


def test_with_skip_a_network_that_gives_nothing_gives_the_picture() -> None:
    generator = Generator(replace(SHAPE, skip=True)).double()
    torch.nn.init.zeros_(generator.layers[-1].weight)
    images = torch.linspace(-1, 1, 3 * 16 * 8, dtype=torch.float64).view(1, 3, 16, 8)
    torch.testing.assert_close(generator(images, torch.tensor([1])), images, rtol=0, atol=0.011)


@pytest.mark.parametrize(
    ("height", "width", "halvings"), [(16, 8, 2), (64, 32, 4), (128, 64, 5), (256, 128, 6), (512, 256, 6), (60, 28, 3)]
)
def test_the_discriminators_depth_goes_by_the_size(height: int, width: int, halvings: int) -> None:
    discriminator = Discriminator(5, height, width, channels=2)
    patches, cameras = discriminator(torch.rand(2, 3, height, width))
    assert patches.shape == (2, 1, height >> halvings, width >> halvings)
    assert cameras.shape == (2, 5)


def test_pixels_come_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    for dtype in (torch.float32, torch.float64):
        unit = to_unit(normalise_and_erase(pixels.clone()), dtype)
        assert unit.dtype == dtype
        assert unit.min() == pytest.approx(-1, abs=1e-6)
        assert unit.max() == pytest.approx(1, abs=1e-6)
        assert torch.equal(to_pixels(unit), pixels)


def test_a_generators_file(tmp_path: Path) -> None:
    generator, path = Generator(SHAPE), tmp_path / "generator.safetensors"
    save_generator(generator, path)
    read = load_generator(path)
    assert read.shape == SHAPE
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in generator.state_dict().items())

    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="is damaged"):
        load_generator(path)
    for absent in (tmp_path / "other", tmp_path):
        with pytest.raises(UserError, match=f"^{absent} cannot be read"):
            load_generator(absent)


@pytest.mark.parametrize("sides", [(18, 8), (16, 10), (4, 4), (16, 4096)])
def test_a_generator_of_other_sizes_is_refused(sides: tuple[int, int], tmp_path: Path) -> None:
    generator = Generator(SHAPE)
    generator.shape = replace(SHAPE, height=sides[0], width=sides[1])
    save_generator(generator, tmp_path / "generator.safetensors")
    with pytest.raises(UserError, match="is damaged"):
        load_generator(tmp_path / "generator.safetensors")


def test_a_generator_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    generator = Generator(SHAPE)
    torch.nn.init.constant_(generator.layers[-1].weight, float("nan"))
    save_generator(generator, tmp_path / "generator.safetensors")
    with pytest.raises(UserError, match="its tensors are not finite"):
        load_generator(tmp_path / "generator.safetensors")
