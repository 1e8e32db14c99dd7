"""Identities: the attributes that stay with a person from camera to camera."""

from dataclasses import dataclass

from ecn_dist.synthetic.draws import RGB, Draws, rgb
from ecn_dist.synthetic.spec import Color, PeopleSpec

SKINS: tuple[Color, ...] = (
    (0.07, 0.28, 0.95),
    (0.07, 0.38, 0.85),
    (0.06, 0.48, 0.68),
    (0.05, 0.55, 0.48),
    (0.05, 0.55, 0.34),
)
HAIRS: tuple[Color, ...] = (
    (0.08, 0.4, 0.1),
    (0.07, 0.55, 0.25),
    (0.06, 0.6, 0.4),
    (0.11, 0.5, 0.75),
    (0.1, 0.04, 0.68),
)
HAIR_STYLES = (("short", 0.4), ("long", 0.25), ("bun", 0.15), ("bald", 0.08), ("bob", 0.12))


@dataclass(frozen=True)
class Garment:
    """A piece of clothing. `period` is the pattern's, in units of the person's height."""

    kind: str
    pattern: str
    color: RGB
    second: RGB
    period: float


@dataclass(frozen=True)
class Person:
    """One identity. Lengths and widths are factors on a mean body's."""

    height: float
    width: float
    shoulders: float
    hips: float
    legs: float
    skin: RGB
    hair: RGB
    hair_style: str
    hat: str
    hat_color: RGB
    upper: Garment
    inner: RGB
    """What shows under an open jacket or coat."""
    lower: Garment
    lower_length: float
    """Of shorts and skirts, as a share of the leg."""
    long_sleeves: bool
    shoes: RGB
    bag: str
    bag_color: RGB
    bag_size: float


def draw_person(spec: PeopleSpec, draws: Draws) -> Person:
    """Draw one identity from a domain's distribution."""
    upper_kind = draws.choice(spec.uppers)
    lower_kind = draws.choice(spec.lowers)
    lower_pattern = "plain"
    if draws.chance(spec.lower_pattern):
        lower_pattern = draws.choice(
            (("bars", 1.0), ("checks", 1.0), ("dots", 0.5))
            if lower_kind == "skirt"
            else (("bars", 0.7), ("checks", 1.0))
        )
    return Person(
        height=1 + min(max(draws.normal(0.05), -0.12), 0.12),
        width=draws.uniform((0.85, 1.25)),
        shoulders=draws.uniform((0.9, 1.12)),
        hips=draws.uniform((0.9, 1.12)),
        legs=draws.uniform((0.95, 1.06)),
        skin=draws.color(SKINS, 0.03),
        hair=draws.color(HAIRS, 0.04),
        hair_style=draws.choice(HAIR_STYLES),
        hat=draws.choice(spec.hats),
        hat_color=rgb(_cloth_color(spec, draws)),
        upper=_garment(spec, draws, upper_kind, draws.choice(spec.patterns)),
        inner=rgb(_cloth_color(spec, draws)),
        lower=_garment(spec, draws, lower_kind, lower_pattern),
        lower_length=draws.uniform((0.3, 0.5) if lower_kind == "shorts" else (0.35, 0.8)),
        long_sleeves=upper_kind in ("jacket", "coat") or (upper_kind == "shirt" and draws.chance(0.7)),
        shoes=rgb((draws.uniform((0.0, 1.0)), draws.uniform((0.0, 0.6)), draws.uniform((0.08, 0.95)))),
        bag=draws.choice(spec.bags),
        bag_color=rgb(_cloth_color(spec, draws)),
        bag_size=draws.uniform((0.8, 1.2)),
    )


def _garment(spec: PeopleSpec, draws: Draws, kind: str, pattern: str) -> Garment:
    hue, saturation, value = _cloth_color(spec, draws)
    contrast = draws.uniform(spec.contrast)
    second = (
        hue + (draws.normal(0.15) if draws.chance(0.5) else 0.0),
        saturation * draws.uniform((0.4, 1.1)),
        value + contrast if value < 0.5 else value - contrast,
    )
    return Garment(kind, pattern, rgb((hue, saturation, value)), rgb(second), draws.uniform((0.045, 0.1)))


def _cloth_color(spec: PeopleSpec, draws: Draws) -> Color:
    hue, saturation, value = draws.uniform((0.0, 1.0)), draws.uniform(spec.saturation), draws.uniform(spec.value)
    if draws.chance(spec.neutral):
        return hue, draws.uniform((0.0, 0.08)), draws.uniform((0.08, 0.95))
    return hue, saturation, value
