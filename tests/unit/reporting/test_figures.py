"""All figures of a run by one call."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ecn_dist.data.reader import ShardReader
from ecn_dist.reporting.figures import write_cluster_figures, write_figures
from ecn_dist.reporting.report import _FIGURES
from ecn_dist.reporting.sheets import Domain, draw_clusters
from tests.picture_cases import evaluation_of, pixels_of, random_case
from tests.report_cases import shards_of
from tests.tiny_shards import write_split

RESULTS = ["ranked_best", "ranked_worst", "ranked_random", "failures", "cmc"]


def test_all_figures_of_a_run(tmp_path: Path) -> None:
    evaluation = evaluation_of(random_case(0, queries=12))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "loss": 2.0}\n')
    index = shards_of(tmp_path / "shards", queries=12)
    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    write_figures(tmp_path, evaluation, {"source": index, "target": index}, writer=writer, step=7)
    writer.close()
    names = [*RESULTS, "camera_pairs", "domains", "style_copies", "training"]
    written = list((tmp_path / "figures").glob("*.png"))
    assert {path.stem for path in written} == set(names)
    assert all(path.stem in _FIGURES for path in written)  # the report has words for each
    assert all(Image.open(path).width > 300 for path in written)
    assert (tmp_path / "report.html").is_file()
    logged = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert all(f"figures/{name}".encode() in logged for name in names)


def test_figure_of_clusters_goes_by_exemplar_index(tmp_path: Path) -> None:
    split = write_split(tmp_path, [7, 5], styles=False)
    assert split.indices.tolist() != list(range(12))
    labels = np.arange(12) // 6  # exemplars 0..5, and 6..11
    write_cluster_figures(tmp_path, split, labels)
    written = tmp_path / "figures" / "clusters.png"
    reader = ShardReader()
    read_picture = lambda row: reader.read_picture(split, row)  # noqa: E731
    drawn = draw_clusters(split.indices // 6, Domain("target", split.camids, read_picture, split.pids))
    np.testing.assert_array_equal(np.asarray(Image.open(written).convert("RGB")), pixels_of(drawn))
    words = [text.get_text() for text in drawn.texts]
    assert [line.splitlines()[:2] for line in words[2:4]] == [["large", "cluster 0"], ["large", "cluster 1"]]
    assert all("6 pictures" in line for line in words[2:4])


def test_figures_without_cameras(tmp_path: Path) -> None:
    index = shards_of(tmp_path / "shards", queries=12, camera_style="none")
    write_figures(tmp_path, evaluation_of(random_case(0, queries=12), camera_free=True), {"target": index})
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {*RESULTS, "domains"}
