"""The report of a run: what it says, that it is whole, and that nothing in it is taken for markup."""

import base64
import io
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ecn_dist import report as command
from ecn_dist.errors import UserError
from ecn_dist.reporting.report import write_report
from ecn_dist.reporting.run_reader import merge_steps, read_metrics
from tests.report_cases import EVALUATION, write_run

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and whether every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words += " " + data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "x")


def test_it_says_what_was_trained_how_well_it_does_and_on_what(run: Path) -> None:
    page = Page(write_report(run))
    assert page.open == []
    for words in (
        "What was trained",
        "exemplar-invariance (E), camera-invariance (C) and neighbourhood-invariance (N, k = 6, from epoch 2)",
        "shards/source",
        "shards/target",
        "small_resnet",
        "Epochs on the source alone, first 4 Epochs 12",
        "How well it does",
        "mAP, trapezoid 43.1",
        "mAP, step-wise 42.2",
        "rank-1 75.3",
        "Over the 3,368 queries",
        "Where it fails",
        "24.7 percent of the queries have another person at rank 1",
        "1 h 02 min",
        "912.3",
        "loss.neighbors_from_epoch 2",
        "Model T",
    ):
        assert words in page.text
    assert "notice" not in [attributes.get("class") for attributes in page.all("p")]


def test_it_is_whole(run: Path) -> None:
    page = Page(write_report(run))
    assert page.all("script") == []
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    links = [attributes[key] for _, attributes in page.tags for key in ("src", "href", "action") if key in attributes]
    assert all(link is not None and link.startswith(("data:", "#")) for link in links)
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {link[1:] for link in links if link is not None and link.startswith("#")} <= targets
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "url(" not in (run / "report.html").read_text()


def test_pictures_are_inlined_with_their_words(run: Path) -> None:
    folder = run / "figures"
    folder.mkdir()
    noise = Image.effect_noise((300, 200), 90).convert("RGB")
    noise.save(folder / "mine.png")  # a picture that is not ours: no words, a name of its own
    page = Page(write_report(run))
    assert {path.name for path in folder.iterdir()} == {"mine.png"}
    pictures = {attributes["alt"]: attributes for attributes in page.all("img")}
    assert len(pictures) == 2
    data = base64.b64decode(str(pictures["mine. "]["src"]).partition("base64,")[2])
    shown = Image.open(io.BytesIO(data))
    assert shown.size == (300, 200)
    difference = [abs(a - b) for a, b in zip(shown.convert("L").tobytes(), noise.convert("L").tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 12
    assert any("From metrics.jsonl" in str(words) for words in pictures)


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;"


def test_nothing_from_a_file_is_markup(run: Path) -> None:
    (run / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE, "source": HOSTILE, "epochs": HOSTILE}))
    summary = {"machine": {HOSTILE: HOSTILE}, "evaluation": EVALUATION, "steps": HOSTILE}
    (run / "summary.json").write_text(json.dumps(summary))
    folder = run / "figures"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / 'a"><script>b.png')
    findings = {"weakest_camera_pairs": [{"query_camera": HOSTILE, "gallery_camera": 1, "value": 0.5}]}
    (folder / "findings.json").write_text(json.dumps(findings))
    page = Page(write_report(run, comparison={HOSTILE: [EVALUATION]}))
    assert page.all("script") == []
    assert all(str(attributes["src"]).startswith("data:") for attributes in page.all("img"))
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert page.open == []
    assert page.text.count(HOSTILE) >= 8  # shown as it is, again and again


def test_control_characters_of_names_are_escaped(run: Path) -> None:
    name = "\x1b[2J\u202egpj.exe\n"
    (run / "config.yaml").write_text(json.dumps({name: name, "source": name}))
    (run / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(run / "figures" / f"a{name}.png")
    text = write_report(run, comparison={name: [EVALUATION]}).read_text()
    assert all(line.isprintable() for line in text.splitlines())
    assert text.count(r"\x1b[2J\u202egpj.exe\n") >= 5


def test_names_of_metrics_may_be_no_text(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "loss_\\ud800": 3.0, "\\ud800": 2.0}\n' * 2)
    assert "loss" in write_report(run).read_text()


def test_no_password_leaves_with_the_report(run: Path) -> None:
    url = "https://agnes:hunter2@store.example/target?signature=sesame#part"
    config = {"target": url, "model": {"weights": f"s3://agnes:h@hunter2@bucket/w?key=sesame {url}"}}
    (run / "config.yaml").write_text(json.dumps(config))
    text = write_report(run).read_text()
    assert "https://store.example/target" in text
    assert "s3://bucket/w" in text
    for secret in ("hunter2", "agnes", "sesame"):
        assert secret not in text


def test_no_command_of_a_source_leaves_with_the_report(run: Path) -> None:
    sources = ["pipe:curl -H 'Authorization: Bearer T0KEN' https://host/{}", "pipe:KEY=T0KEN aws s3 cp\n s3://T0KEN -"]
    (run / "config.yaml").write_text(json.dumps({"source": sources[0], "target": sources[1], "data": {"x": sources}}))
    text = write_report(run).read_text()
    assert "T0KEN" not in text
    assert "pipe:(a command, not shown)" in text


WRONG: list = [None, [], {}, "x", True, math.nan, math.inf, -1, 10**400, [1], {"a": 1}]


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_numbers_of_any_type_are_borne(run: Path, value: object) -> None:
    keys = ["steps", "epochs", "world_size", "images_per_second", "wall_seconds", "machine"]
    evaluation = dict.fromkeys([*EVALUATION, "collapsed_queries"], value)
    answers = dict.fromkeys(["num_queries", "num_wrong", "num_wrong_own_camera", "own_camera_share"], value)
    metrics = ["epoch", "loss", "lr", "evaluation", "outliers", "cluster_size_mean", "cluster_ami"]
    rows = [{"step": 1} | dict.fromkeys(metrics, value) | {"clusters": clusters} for clusters in (value, 3)]
    folder = run / "figures"
    folder.mkdir()
    pairs = [dict.fromkeys(["query_camera", "gallery_camera", "value"], value)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for findings, summary in (
        (
            {"first_answers": answers, "weakest_camera_pairs": pairs},
            dict.fromkeys(keys, value) | {"evaluation": evaluation},
        ),
        ({"first_answers": value, "weakest_camera_pairs": value}, {"evaluation": value, "data": value}),
    ):
        (folder / "findings.json").write_text(json.dumps(findings))
        (run / "summary.json").write_text(json.dumps(summary))
        assert Page(write_report(run)).open == []


def test_a_collapsed_network_is_named(run: Path) -> None:
    assert "collapsed" not in Page(write_report(run)).text
    summary = {"evaluation": EVALUATION | {"collapsed_queries": 3368}}
    (run / "summary.json").write_text(json.dumps(summary))
    assert "3,368 of 3,368 queries have all gallery pictures at one distance" in Page(write_report(run)).text


def test_clusters_are_told_by_epoch(run: Path) -> None:
    assert "Clusters" not in Page(write_report(run)).text
    rows: list[dict] = [{"step": 1, "epoch": 0, "clusters": 1234, "outliers": 56, "cluster_size_mean": 7.25}]
    for row, words in (
        ({"step": 1, "epoch": 0, "loss": 1.0}, "Epoch Clusters Mean size Outliers 0 1,234 7.2 56 Clusters : groups"),
        ({"step": 5, "epoch": 1, "clusters": 700, "cluster_ami": 0.5}, "0 1,234 7.2 56 1 700 0.500"),
        ({"step": 9, "epoch": 2, "clusters": 800, "outliers": 0, "cluster_ami": 0.25}, "2 800 0 0.250 Clusters"),
    ):
        rows.append(row)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        page = Page(write_report(run))
        assert words in page.text
        assert any(str(image["alt"]).startswith("How the clusters formed") for image in page.all("img"))
    assert "AMI : adjusted mutual information" in page.text
    rows = [{"step": step, "epoch": step, "clusters": 100 + step} for step in range(100)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(write_report(run)).text
    assert "0 100 14 114 28 128 42 142 57 157 71 171 85 185 99 199 Clusters" in text  # eight of many, evenly


def test_another_output_leaves_the_run_as_it_is(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_report(run, output=tmp_path / "page.html", comparison={"a": [EVALUATION]})
    write_report(run, output="/dev/null")
    assert Path("/dev/null").is_char_device()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_picture_too_large_to_open_is_named(run: Path) -> None:
    folder = run / "figures"
    folder.mkdir()
    data = io.BytesIO()
    Image.new("1", (8, 8)).save(data, "PNG")
    for side in (7_000, 10_000, 30_000):  # too large for us, Pillow's warning, Pillow's error
        head = b"IHDR" + struct.pack(">II", side, side) + data.getvalue()[24:29]
        bomb = data.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + data.getvalue()[33:]
        (folder / "bomb.png").write_bytes(bomb)
        with pytest.raises(UserError, match=r"bomb\.png: is no readable PNG"):
            write_report(run)


def test_comparison_shows_mean_and_spread_and_stays_with_the_run(run: Path) -> None:
    seeds = [{"mAP": 0.30, "rank1": 0.4}, {"mAP": 0.32, "rank1": 0.5}, {"mAP": 0.37, "rank1": 0.6}]
    comparison = {"source only": [{"mAP": 0.2, "rank1": 0.7}], "E + C": seeds}
    for path in (write_report(run, comparison=comparison), write_report(run)):
        page = Page(path)
        assert "Comparison" in page.text
        assert "source only 20.0 70.0 1" in page.text
        assert "E + C 33.0 ± 3.6 50.0 ± 10.0 3" in page.text  # sample standard deviation
        # One a column: E + C for mAP, source only for rank-1.
        assert re.findall(r"<b>([\d.]+)</b>", path.read_text().partition("Comparison")[2]) == ["70.0", "33.0"]
        assert "mINP" not in page.text.partition("Comparison")[2].partition("source only")[0]  # no run has it


def test_a_run_going_on_is_shown_as_far_as_it_is(run: Path) -> None:
    (run / "summary.json").unlink()
    page = Page(write_report(run))
    assert "has not ended" in page.text
    assert "up to step 248" in page.text
    assert len(page.all("img")) == 1  # the training curves, drawn from what there is
    (run / "config.yaml").unlink()
    page = Page(write_report(run))
    assert "no config.yaml" in page.text
    assert page.open == []


def test_metrics_of_a_resumed_and_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text(
        '{"step": 1, "loss": 3}\n{"step": 3, "loss": 9}\n\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1}\n{"st'
    )
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 2, 3]
    rows = merge_steps(read_metrics(path))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert math.isnan(rows[1]["loss"])
    assert rows[2]["loss"] == 1  # the later line
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    for broken in (b"[1]", b"5", b'{"x": 1}', b'{"step": "x"}', b'{"step": NaN}', b"\xff", b"[" * 100_000):
        path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 2}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no JSON object"):
            read_metrics(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yaml", b"a: [", "config.yaml"),
        ("config.yaml", b"- 1", "no mapping"),
        ("config.yaml", b"a: &a [1]\nb: *a", "config.yaml.*alias"),
        ("summary.json", b"{", "summary.json"),
        ("figures/x.png", b"no PNG", "x.png"),
        ("figures/findings.json", b"[]", "findings"),
        ("comparison.json", b'{"rows": 3}', "comparison"),
        ("comparison.json", b"[]", "comparison"),
    ],
)
def test_a_broken_file_is_named(run: Path, name: str, content: bytes, words: str) -> None:
    (run / "figures").mkdir()
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        write_report(run)
    assert not (run / "report.html").exists()


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "page.html"
    assert command.main(["--run", str(run), "--output", str(output), "--compare", f"full = E+C+N={run}"]) == 2
    assert "no such folder" in capsys.readouterr().err  # NAME ends at the first equals sign
    assert command.main(["--run", str(run), "--output", str(output), "--compare", f"full={run}"]) == 0
    assert str(output) in capsys.readouterr().out
    assert "full 43.1 42.2 75.3" in Page(output).text
    assert not (run / "report.html").exists()
    for argv, words in (
        (["--run", str(tmp_path / "gone")], "no such folder"),
        (["--run", str(tmp_path)], "no run folder"),
        (["--run", str(run), "--compare", "nonsense"], "NAME=RUN"),
    ):
        assert command.main(argv) == 2
        assert words in capsys.readouterr().err


def test_the_best_on_validation_people_is_named(run: Path) -> None:
    said = "step-00000040 had the highest step-wise mAP on validation identities (31.4 percent)"
    assert "validation identities" not in Page(write_report(run)).text
    summary = json.loads((run / "summary.json").read_text())
    best = {"step": 40, "validation": {"data": "a fingerprint", "mAP_stepwise": 0.314}}
    (run / "summary.json").write_text(json.dumps(summary | {"best": best}))
    assert said in Page(write_report(run)).text
    for broken in (None, 3, {"step": 40}, {"step": "x", "validation": {"mAP_stepwise": 0.1}}, best | {"validation": 1}):
        (run / "summary.json").write_text(json.dumps(summary | {"best": broken}))
        assert "validation identities" not in Page(write_report(run)).text
