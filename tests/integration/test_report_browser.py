"""The report in a real headless Chromium: it opens without an error, asks for nothing, and can be read."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecn_dist.reporting.report import write_report
from tests.chromium import Chromium, find_chromium
from tests.integration.conftest import Domains
from tests.integration.training import train_on
from tests.report_cases import EVALUATION, write_run

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="there is no Chromium on this machine (Debian's package: chromium)"
)

# The contrast of every visible text with what is behind it (WCAG 2), lowest first.
CONTRASTS = """
(() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const color = text => text.match(/[0-9.]+/g).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = color(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(color(getComputedStyle(e).color)), light(behind(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName, e.textContent.slice(0, 30)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "x", figures=True)
    return write_report(run, comparison={"source only": [EVALUATION], "E + C + N": [EVALUATION] * 2})


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None
    with Chromium(program) as browser:
        yield browser


def assert_opens_cleanly(browser: Chromium, report: Path) -> None:
    """No error, nothing asked for beside the file, and every picture shown at a size that can be read."""
    browser.show(1280)
    browser.open(report)
    wrong = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed"}
    assert [event for event in browser.events if event["method"] in wrong] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [report.resolve().as_uri()]
    pictures = browser.evaluate(
        "[...document.images].map(i => [i.alt, i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(pictures) == 9
    for words, complete, natural_width, width in pictures:
        assert words
        assert complete
        assert natural_width > 300
        assert width > 300


def test_it_opens_without_an_error_and_asks_for_nothing(browser: Chromium, report: Path) -> None:
    assert_opens_cleanly(browser, report)
    assert browser.evaluate("document.title").startswith("x - ")


@pytest.mark.timeout(300)
def test_so_does_the_one_that_training_writes(browser: Chromium, ranks, small_domains: Domains, tmp_path: Path) -> None:
    short = ["--optim.source_only_epochs", "0", "--epochs", "1", "--logging.tensorboard", "false"]
    assert train_on(ranks, 2, [*small_domains.options, *short, "--output_dir", str(tmp_path)]) == {0}
    assert_opens_cleanly(browser, tmp_path / "report.html")
    text = browser.evaluate("document.body.innerText")
    mean_ap = json.loads((tmp_path / "summary.json").read_text())["evaluation"]["mAP"]
    assert f"{100 * mean_ap:.1f}" in text
    assert str(small_domains.target) in text


def test_a_person_finds_the_answers(browser: Chromium, report: Path) -> None:
    browser.show(1280)
    browser.open(report)
    text = browser.evaluate("document.body.innerText")
    for words in ("What was trained", "How well it does", "43.1", "Where it fails", "wrong first answers", "E + C + N"):
        assert words in text
    assert "loss.target_weight" not in text  # the full configuration is folded away ...
    browser.evaluate("document.querySelector('summary').click()")
    assert "loss.target_weight" in browser.evaluate("document.body.innerText")  # ... and opens without a script of ours
    inside = "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
    assert browser.evaluate(inside)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(
    browser: Chromium, report: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    browser.show(width, dark=dark)
    browser.open(report)
    page = json.loads(
        browser.evaluate("JSON.stringify(getComputedStyle(document.body).backgroundColor.match(/\\d+/g))")
    )
    assert (max(map(int, page)) < 60) == dark
    lowest = browser.evaluate(CONTRASTS)[0]
    assert lowest[0] >= 4.5, lowest
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # no sideways scrolling of the page
