"""Embedder: the features of `evaluate`, from whatever form a picture comes in."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecn_dist import Embedder
from ecn_dist.data import ShardIndex
from ecn_dist.errors import UserError
from ecn_dist.ranking import EvaluationInput
from ecn_dist.ranking.evaluating import evaluate_backbone
from ecn_dist.serving.embedder import PictureFile
from ecn_dist.training.trained import load_trained
from tests.augment import prepare_picture
from tests.tiny_shards import write_split
from tests.trained_cases import turned, write_pictures, write_trained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def embedder(run: Path) -> Embedder:
    return Embedder.load(run, device="cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 7)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_features_are_those_of_evaluate(precision: str, tmp_path: Path) -> None:
    run = write_trained_run(tmp_path / "run", precision=precision)
    split = write_split(tmp_path, [5, 4], sizes=((32, 16), (70, 41)))
    backbone, config = load_trained(run, torch.device("cpu"))
    size = EvaluationInput(config.data.height, config.data.width, batch_size=4, workers=0)
    index = ShardIndex(str(tmp_path), "market", 3, ("1", "2", "3"), {"query": split, "gallery": split}, {})
    evaluated = evaluate_backbone(backbone, index, size, precision, torch.device("cpu"))
    files = []
    for row in range(len(split)):
        member = split.members[row]
        with open(split.shard_path(int(member["shard"])), "rb") as shard:
            shard.seek(int(member["offset"][split.num_cameras]))
            files.append(PictureFile(str(row), shard.read(int(member["length"][split.num_cameras]))))
    features = Embedder.load(run, device="cpu")(files, batch_size=4)
    np.testing.assert_array_equal(features, evaluated.query.features.float().numpy())
    np.testing.assert_array_equal(features, evaluated.gallery_part.features.float().numpy())
    np.testing.assert_allclose(np.linalg.norm(features.astype(np.float64), axis=1), 1, atol=1e-6)


def test_features_follow_the_definition(run: Path, embedder: Embedder, paths: list[Path]) -> None:
    backbone, _ = load_trained(run, torch.device("cpu"))
    backbone.double()
    images = torch.stack([prepare_picture(Image.open(path).convert("RGB"), 64, 32) for path in paths]).double()
    with torch.no_grad():
        pooled = backbone(images)
    expected = pooled / pooled.square().sum(1, keepdim=True).sqrt()
    features = embedder(paths)
    assert features.dtype == np.float32
    assert features.shape == (7, embedder.num_features)
    np.testing.assert_allclose(np.linalg.norm(features.astype(np.float64), axis=1), 1, atol=1e-6)
    # The definition resizes with PIL, the embedder as evaluation does: within two grey levels of it.
    np.testing.assert_allclose(features, expected, atol=0.01)
    assert (features.astype(np.float64) * expected.numpy()).sum(1).min() > 0.9995
    assert np.abs(features[0] - features[1]).max() > 0.01


def test_all_forms_of_a_picture_give_the_same_features(embedder: Embedder, paths: list[Path]) -> None:
    expected = embedder(paths)
    array = np.asarray(Image.open(paths[3]).convert("RGB"))
    backwards = np.ascontiguousarray(array[..., ::-1])  # as OpenCV reads it
    mixed = [
        str(paths[0]),
        Image.open(paths[1]),
        PictureFile("2", paths[2].read_bytes()),
        backwards[..., ::-1],
        paths[4],
        Image.open(paths[5]).convert("RGBA"),
        paths[6],
    ]
    np.testing.assert_array_equal(embedder(mixed), expected)
    np.testing.assert_array_equal(embedder(picture for picture in mixed), expected)
    np.testing.assert_array_equal(embedder(np.stack([array, array])), embedder([paths[3], paths[3]]))


def test_batch_size_changes_rounding_alone(embedder: Embedder, paths: list[Path]) -> None:
    expected = embedder(paths)
    for batch_size in (1, 2, 3, 7):
        np.testing.assert_allclose(embedder(paths, batch_size=batch_size), expected, atol=1e-6)
    assert embedder([]).shape == (0, embedder.num_features)


def test_pictures_are_turned_upright(embedder: Embedder, paths: list[Path], tmp_path: Path) -> None:
    upright = tmp_path / "upright.png"
    Image.open(paths[2]).save(upright)
    on_its_side = turned(upright, tmp_path / "turned.png")
    assert Image.open(on_its_side).size == Image.open(upright).size[::-1]
    expected = embedder([upright])
    np.testing.assert_array_equal(embedder([on_its_side]), expected)
    np.testing.assert_array_equal(embedder([Image.open(on_its_side)]), expected)


def test_16_bit_grey_pictures_are_told_apart(embedder: Embedder, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = [random.integers(20_000, 60_000, (64, 32)).astype(np.uint16) for _ in range(2)]
    files = [tmp_path / f"infrared{i}.png" for i in range(2)]
    for file, pixels in zip(files, values, strict=True):
        Image.fromarray(pixels).save(file)
    features = embedder(files)
    assert np.linalg.norm(features[0] - features[1]) > 1e-3
    grey = [np.repeat(np.rint(pixels / 257).astype(np.uint8)[..., None], 3, axis=2) for pixels in values]
    np.testing.assert_array_equal(features, embedder(grey))
    np.testing.assert_array_equal(features, embedder([Image.open(file) for file in files]))
    depth = Image.fromarray(values[0].astype(np.float32))
    with pytest.raises(UserError, match=r"picture 1: .*mode F, .*unknown"):
        embedder([files[0], depth])
    depth.save(tmp_path / "depth.tif")
    with pytest.raises(UserError, match=r"depth\.tif: .*mode F, .*unknown"):
        embedder([tmp_path / "depth.tif"])


def test_a_generator_is_read_two_batches_at_a_time(embedder: Embedder, paths: list[Path]) -> None:
    taken = []

    def pictures() -> object:
        for path in paths * 5:
            taken.append(path)
            yield path

    ahead = []
    embed = embedder._embed

    class Watching(Embedder):
        def _embed(self, pixels_bHW3: torch.Tensor) -> np.ndarray:
            ahead.append(len(taken))
            return embed(pixels_bHW3)

    watching = Watching(embedder.backbone, embedder.config, embedder.device)
    assert len(watching(pictures(), batch_size=10)) == 35
    assert ahead == [20, 30, 35, 35]


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (np.zeros((4, 4, 3)), r"picture 1: an array must be uint8 .*float64 of shape \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"picture 1: .*uint8 of shape \(4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"picture 1: .*shape \(0, 4, 3\)"),
        (
            PictureFile("shop/7.jpg", b"no picture"),
            r"^shop/7\.jpg: cannot be decoded as a picture \(its bytes are of no",
        ),
        (Image.new("RGB", (0, 4)), r"picture 1: has no pixels, it is 0 x 4"),
        ("missing/picture.jpg", r"missing/picture\.jpg: cannot be read as picture 1: No such file"),
        (3.5, r"picture 1: must be a path.*not float"),
        (b"\xff\xd8", r"picture 1: must be a path.*not bytes"),
    ],
    ids=["float", "grey", "empty", "no picture", "no pixels", "missing", "number", "bytes"],
)
def test_a_bad_picture_is_named(embedder: Embedder, paths: list[Path], picture: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        embedder([paths[0], picture, paths[1]], batch_size=2)


def test_damaged_pictures_are_named(embedder: Embedder, paths: list[Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(paths[0].read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cut\.jpg: cannot be decoded"):
        embedder([*paths, cut])
    with pytest.raises(UserError, match=r"picture 0: cannot be decoded"):
        embedder([Image.open(cut)])
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match=r"sparse\.jpg: cannot be read as picture 0: it has 1,000,000,000,000 bytes"):
        embedder([tmp_path / "sparse.jpg"])


def test_one_picture_is_no_list(embedder: Embedder, paths: list[Path]) -> None:
    for picture in (str(paths[0]), paths[0], Image.open(paths[0])):
        with pytest.raises(UserError, match=r"embedder\(\[picture\]\)\[0\]"):
            embedder(picture)
    with pytest.raises(UserError, match="batch_size: 0"):
        embedder(paths, batch_size=0)


def test_loading(run: Path, embedder: Embedder, paths: list[Path], tmp_path: Path) -> None:
    expected = embedder(paths)
    weights = tmp_path / "elsewhere" / "weights.safetensors"
    weights.parent.mkdir()
    shutil.copy(run / "weights.safetensors", weights)
    with pytest.raises(UserError, match=r"no config\.yaml is in it"):
        Embedder.load(weights, device="cpu")
    state = torch.random.get_rng_state()
    loaded = [
        Embedder.load(str(run / "weights.safetensors"), device="cpu"),
        Embedder.load(weights, device=torch.device("cpu"), config=run / "config.yaml"),
    ]
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers stay as they were"
    for again in loaded:
        np.testing.assert_array_equal(again(paths), expected)
        assert again.fingerprint == embedder.fingerprint
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        Embedder.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="device"):
        Embedder.load(run, device="no such device")


def test_fingerprint_tells_models_apart(embedder: Embedder, tmp_path: Path) -> None:
    other = Embedder.load(write_trained_run(tmp_path / "other", seed=1), device="cpu")
    assert other.fingerprint != embedder.fingerprint
    same = Embedder.load(write_trained_run(tmp_path / "same", precision="fp64"), device="cpu")
    assert same.fingerprint == embedder.fingerprint


def test_importing_the_package_is_light() -> None:
    code = "import sys, ecn_dist; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; ecn_dist.Nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "AttributeError: module 'ecn_dist' has no attribute 'Nothing'" in done.stderr


def test_weights_that_are_no_numbers_give_no_features(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path / "run")
    embedder = Embedder.load(run, device="cpu")
    with torch.no_grad():
        next(embedder.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="features that are not finite: its weights are damaged"):
        embedder(write_pictures(tmp_path / "pictures", 2))
