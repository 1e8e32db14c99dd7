"""A small drawn data set with narrow networks, for tests of camera styles."""

from pathlib import Path

from ecn_dist.pack import main as pack
from ecn_dist.styles.options import Config
from ecn_dist.synthesize import main as synthesize

NARROW = {"generator_channels": 4, "discriminator_channels": 4, "blocks": 1, "workers": 0, "device": "cpu"}


def pack_cameras(folder: Path) -> Path:
    """Shards of 36 training pictures of 3 cameras, 32 x 16, in 3 shards, with query and gallery; no copies."""
    size = ["--train_identities", "6", "--test_identities", "2", "--cameras", "3", "--pictures_per_camera", "2"]
    size += ["--height", "32", "--width", "16"]
    assert synthesize(["--domain", "target-strong", "--output", str(folder / "data"), *size]) == 0
    places = ["--input", str(folder / "data"), "--output", str(folder / "shards")]
    assert pack(["--layout", "market", *places, "--camera_style", "none", "--min_shards", "3"]) == 0
    return folder / "shards"


def narrow(folder: Path, **changed: object) -> Config:
    """Options of a run in `folder` on `pack_cameras`'s shards there."""
    given = {"data": str(folder / "shards"), "output": str(folder / "styled"), "output_dir": str(folder / "run")}
    given |= {"batch_size": 12, "height": 32, "width": 16, "steps": 10, "critic_steps": 2}
    return Config(**{**given, **NARROW, **changed})  # type: ignore[arg-type]


def as_options(config: Config) -> list[str]:
    """The command line of these options."""
    return [part for key, value in vars(config).items() if value != "" for part in (f"--{key}", str(value))]
