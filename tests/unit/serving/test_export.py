"""export: each format holds the model and says how to feed it; a file that does not is never kept."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ecn_dist import Embedder, export
from ecn_dist.config import flatten
from ecn_dist.errors import UserError
from ecn_dist.reporting import model_card
from ecn_dist.serving import exporting
from ecn_dist.training.checkpoint import CheckpointStore
from ecn_dist.training.trained import load_trained
from tests.augment import prepare_picture
from tests.report_cases import EVALUATION
from tests.trained_cases import write_pictures, write_trained_run

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}


def needs(kind: str) -> None:
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs the extra `export` ({package})")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.mark.parametrize("kind", list(SUFFIXES))
def test_an_export_gives_the_models_features(kind: str, run: Path, tmp_path: Path) -> None:
    needs(kind)
    output = tmp_path / f"model{SUFFIXES[kind]}"
    assert export.main(["--checkpoint", str(run), "--format", kind, "--output", str(output)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MODEL_CARD.md", output.name]

    embedder = Embedder.load(run, device="cpu")
    features_of, metadata = _load(kind, output)
    assert metadata["model"] == embedder.fingerprint
    assert metadata["input"]["shape"] == ["n", 3, 64, 32]
    assert metadata["output"]["shape"] == ["n", embedder.num_features]
    assert metadata["input"]["mean"] == [0.485, 0.456, 0.406]
    assert metadata["input"]["std"] == [0.229, 0.224, 0.225]

    images = torch.randn(9, 3, 64, 32)  # a batch that no check has used
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(embedder.backbone(images), dim=1)
    np.testing.assert_allclose(features_of(images), expected, atol=1e-5)
    assert embedder.fingerprint in (tmp_path / "MODEL_CARD.md").read_text()


def _load(kind: str, path: Path) -> tuple[Callable[[torch.Tensor], np.ndarray], dict]:
    """As a program without this project would."""
    extra = {"ecn_dist.json": ""}
    if kind == "pt2":
        program = torch.export.load(path, extra_files=extra).module()
        return lambda images: program(images).detach().numpy(), json.loads(extra["ecn_dist.json"])
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    metadata = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    return lambda images: session.run(None, {"images": images.numpy()})[0], json.loads(metadata["ecn_dist"])


def test_an_exported_file_embeds_pictures_by_its_metadata_alone(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.pt2"
    assert export.main(["--checkpoint", str(run), "--format", "pt2", "--output", str(output)]) == 0
    features_of, metadata = _load("pt2", output)
    height, width = metadata["input"]["shape"][2:]
    from PIL import Image

    paths = write_pictures(tmp_path / "pictures", 4)
    images = torch.stack([prepare_picture(Image.open(path).convert("RGB"), height, width) for path in paths])
    cosine = (features_of(images) * Embedder.load(run, device="cpu")(paths)).sum(1)
    assert cosine.min() > 0.9995  # resized by PIL here: within two grey levels


class Wrong(torch.nn.Module):
    """Not the model: off in one entry of one feature."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.network(images)
        return features + 0.001 * torch.nn.functional.one_hot(torch.tensor(3), features.shape[1])


def test_a_file_that_differs_from_the_model_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    form = exporting.FORMATS["pt2"]

    def write_another(network: torch.nn.Module, images: torch.Tensor, metadata: dict) -> bytes:
        return form.write(Wrong(network), images, metadata)

    output = tmp_path / "model.pt2"
    output.write_bytes(b"the model of before")
    monkeypatch.setitem(exporting.FORMATS, "pt2", form._replace(write=write_another))
    assert export.main(["--checkpoint", str(run), "--format", "pt2", "--output", str(output)]) == 2
    assert "differ from the model's by 0.001" in capsys.readouterr().err
    assert output.read_bytes() == b"the model of before"
    assert list(tmp_path.iterdir()) == [output]


def test_metadata_that_do_not_come_back_are_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = exporting.FORMATS["pt2"]
    monkeypatch.setitem(exporting.FORMATS, "pt2", form._replace(load=lambda data: (form.load(data)[0], {"version": 0})))
    embedder = Embedder.load(run, device="cpu")
    metadata = exporting.describe(embedder.backbone, 64, 32, embedder.fingerprint)
    with pytest.raises(UserError, match="metadata did not come back"):
        exporting.export(embedder.backbone, "pt2", tmp_path / "model.pt2", metadata)
    assert not list(tmp_path.iterdir())


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_another_models_card_is_not_lost(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_trained_run(tmp_path / "other", seed=1)
    folder = tmp_path / "exported"
    folder.mkdir()
    options = ["--format", "pt2", "--output", str(folder / "a.pt2")]
    assert export.main(["--checkpoint", str(run), *options]) == 0
    before = contents(folder)
    assert export.main(["--checkpoint", str(other), *options]) == 2
    assert "card of another model" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_completed_card_is_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", str(run), "--format", "pt2", "--output"]
    assert export.main([*options, str(tmp_path / "a.pt2")]) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept ")]
    card = tmp_path / "MODEL_CARD.md"
    completed = card.read_text() + "\nLicence: CC BY-NC 4.0. All who are in the pictures have signed.\n"
    card.write_text(completed)
    (tmp_path / "a.pt2").unlink()
    for name in ("a.pt2", "b.pt2"):
        assert export.main([*options, str(tmp_path / name)]) == 0
        assert card.read_text() == completed
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept ")]
        assert len(said) == 1
        assert str(card) in said[0]
    assert sorted(contents(tmp_path)) == ["MODEL_CARD.md", "a.pt2", "b.pt2"]


def test_a_runs_card_with_results_is_kept_beside_an_export_of_its_checkpoint(tmp_path: Path) -> None:
    """The last checkpoint is the same model as the exported weights, and nothing is known of it by itself."""
    run = write_trained_run(tmp_path / "run", summary={"evaluation": EVALUATION})
    backbone, config = load_trained(run, torch.device("cpu"))
    state = {f"network.backbone.{key}": tensor for key, tensor in backbone.state_dict().items()}
    CheckpointStore(run / "checkpoints").save(7, state, {})
    model_card.write_card(run / "MODEL_CARD.md", backbone, flatten(config), model_card.facts_of(run))
    before = (run / "MODEL_CARD.md").read_text()
    assert "| mAP, trapezoid | 43.1 |" in before
    options = ["--checkpoint", str(run / "checkpoints" / "step-00000007"), "--format", "pt2", "--output"]
    assert export.main([*options, str(run / "m.pt2")]) == 0
    assert (run / "m.pt2").is_file()
    assert (run / "MODEL_CARD.md").read_text() == before
    (tmp_path / "apart").mkdir()
    assert export.main([*options, str(tmp_path / "apart" / "m.pt2")]) == 0
    assert "43.1" not in (tmp_path / "apart" / "MODEL_CARD.md").read_text()


def test_what_a_card_cannot_be_written_from_is_known_before_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_trained_run(tmp_path / "run")
    (run / "summary.json").write_text("{")
    (tmp_path / "out").mkdir()
    options = ["--checkpoint", str(run), "--format", "pt2", "--output", str(tmp_path / "out" / "m.pt2")]
    assert export.main(options) == 2
    assert "summary.json" in capsys.readouterr().err
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("kind", list(SUFFIXES))
def test_an_export_tells_nothing_of_the_machine_it_was_made_on(kind: str, run: Path, tmp_path: Path) -> None:
    needs(kind)
    output = tmp_path / f"model{SUFFIXES[kind]}"
    assert export.main(["--checkpoint", str(run), "--format", kind, "--output", str(output)]) == 0
    for part in _parts(output):
        for place in (Path(exporting.__file__).parents[1], Path(torch.__file__).parents[1], Path.home(), tmp_path):
            assert str(place).encode() not in part
        assert b"unfinished" not in part


def _parts(path: Path) -> list[bytes]:
    """The file's bytes; of a zip archive its entries, with their names."""
    if not zipfile.is_zipfile(path):
        return [path.read_bytes()]
    with zipfile.ZipFile(path) as archive:
        return [name.encode() + archive.read(name) for name in archive.namelist()]


def test_a_full_disk_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "model.pt2"
    output.write_bytes(b"the model of before")
    monkeypatch.setattr(os, "fsync", full)
    assert export.main(["--checkpoint", str(run), "--format", "pt2", "--output", str(output)]) == 2
    assert f"{output}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert contents(tmp_path) == {output.name: hashlib.sha256(b"the model of before").hexdigest()}


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(kind: str, output: Path) -> str:
        assert export.main(["--checkpoint", str(run), "--format", kind, "--output", str(output)]) == 2
        return capsys.readouterr().err

    assert "must end in .pt2" in error("pt2", tmp_path / "model.pt")
    (tmp_path / "folder.pt2").mkdir()
    assert "is a folder" in error("pt2", tmp_path / "folder.pt2")
    assert "make it first" in error("pt2", tmp_path / "missing" / "model.pt2")


def test_without_onnx_the_extra_is_named(run: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; from ecn_dist.export import main; sys.exit(main())"
    options = ["--checkpoint", str(run), "--format", "onnx", "--output", str(tmp_path / "model.onnx")]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'ecn_dist[export]'" in done.stderr
    assert not list(tmp_path.iterdir())
