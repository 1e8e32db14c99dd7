"""The options of `stylize`, and the size that the data give."""

from pathlib import Path

import pytest

from ecn_dist.errors import UserError
from ecn_dist.styles.options import Config, dump, fitting_size, flatten, load, parse
from tests.tiny_shards import write_split

PLACES = ["--data", "S", "--output", "out/S2/"]


def test_from_the_command_line() -> None:
    config = parse([*PLACES, "--steps", "50", "--lr", "0.001"])
    assert (config.data, config.output_dir, config.steps, config.lr) == ("S", "out/S2-generator", 50, 0.001)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--output is not set"),
        (["--output", "o", "--height", "30"], "height: 30 must be a multiple of 4"),
        (["--output", "o", "--width", "4"], "width: 4 must be a multiple of 4, from 8 on"),
        (["--output", "o", "--blocks", "65"], "blocks: 65 must be at least 0 and at most 64"),
        (["--output", "o", "--generator_channels", "1028"], "generator_channels: 1028 must be .* at most 1024"),
        (["--output", "o", "--steps", str(10**20)], "steps: 10* must be at least 1 and at most"),
        (["--output", "o", "--steps", "0"], "steps: 0 must be at least 1"),
        (["--output", "o", "--precision", "fp16"], "precision"),
        (["--output", "o", "--step", "5"], "step"),
    ],
)
def test_what_is_wrong_is_named(options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(["--data", "S", *options])


def test_stored_and_read_back(tmp_path: Path) -> None:
    config = parse([*PLACES, "--blocks", "2"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config
    assert "output" not in flatten(config)
    assert flatten(config)["blocks"] == 2
    for text in ("method: ecn\n", "- 1\n", "method: stylize\nmemory: 1\n", "{"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="holds no options of stylize"):
            load(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        (((64, 32),), (0, 0), (64, 32)),
        (((64, 32),), (0, 16), (32, 16)),
        (((64, 32),), (32, 0), (32, 16)),
        (((60, 31), (66, 33), (70, 30)), (0, 0), (64, 32)),
        (((512, 200),), (0, 0), (256, 100)),
        (((512, 200),), (128, 64), (128, 64)),
    ],
)
def test_size(tmp_path: Path, sizes: tuple, given: tuple[int, int], expected: tuple[int, int]) -> None:
    split = write_split(tmp_path, [6], styles=False, sizes=sizes)
    assert fitting_size(split, Config(height=given[0], width=given[1])) == expected
