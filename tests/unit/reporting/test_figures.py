"""All figures of a run by one call."""

from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ecn_dist.reporting.figures import write_run_figures
from ecn_dist.reporting.run_reader import FigureFile, read_figure
from ecn_dist.reporting.sheets import Domain
from tests.picture_cases import evaluation_of, plain_picture, random_case

RESULTS = ["ranked_best", "ranked_worst", "ranked_random", "failures", "cmc"]


def read(path: Path) -> FigureFile:
    return read_figure(path.stem, path.read_bytes())


def test_all_figures_of_a_run(tmp_path: Path) -> None:
    evaluation = evaluation_of(random_case(0, queries=12))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "loss": 2.0}\n')
    gallery = evaluation.gallery_part
    domain = Domain("target", gallery.camids.numpy(), plain_picture, gallery.pids.numpy())
    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    written = write_run_figures(
        tmp_path,
        evaluation,
        read_query=plain_picture,
        read_gallery=lambda row: plain_picture(100 + row),
        domains=[domain, domain],
        read_copy=lambda row, camera: plain_picture(row),
        queries=2,
        failures=2,
        top=3,
        writer=writer,
        step=7,
    )
    writer.close()
    names = [*RESULTS, "camera_pairs", "domains", "style_copies", "training"]
    assert [path.name for path in written] == [f"{name}.png" for name in names]
    assert all(read(path).caption for path in written)
    logged = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert all(f"figures/{name}".encode() in logged for name in names)


def test_figures_without_cameras(tmp_path: Path) -> None:
    written = write_run_figures(
        tmp_path,
        evaluation_of(random_case(0, queries=12), camera_free=True),
        read_query=plain_picture,
        read_gallery=plain_picture,
        domains=[Domain("target", np.zeros(5, dtype=np.int64), plain_picture)],
        queries=1,
        failures=1,
        top=2,
    )
    assert [path.stem for path in written] == [*RESULTS, "domains"]
    assert "same camera" not in read(written[0]).caption
