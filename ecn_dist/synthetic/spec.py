"""What a synthetic domain is: a distribution of people, a family of places, a range of cameras."""

from dataclasses import dataclass

Range = tuple[float, float]
Weights = tuple[tuple[str, float], ...]
"""A name and its share; shares need not sum to 1."""
Color = tuple[float, float, float]
"""Hue, saturation, value, each in 0..1."""


@dataclass(frozen=True)
class PeopleSpec:
    """How the people of a domain look. Clothes' colours are drawn in hue, saturation and value."""

    saturation: Range
    value: Range
    neutral: float
    """Share of garments that are black, grey or white."""
    patterns: Weights
    """Of the upper garment: plain, stripes, bars, checks, dots, blocks, logo."""
    lower_pattern: float
    """Share of trousers and skirts that carry a pattern too."""
    contrast: Range
    """How far a pattern's second colour stands off the first, in value."""
    uppers: Weights
    """tee, shirt, jacket, coat."""
    lowers: Weights
    """trousers, shorts, skirt."""
    hats: Weights
    """none, cap, beanie."""
    bags: Weights
    """none, backpack, shoulder, handbag."""


@dataclass(frozen=True)
class PlaceSpec:
    """The family of backgrounds, shared by all cameras of a domain: were each camera to have a place of its own, a
    network could tell the cameras apart by the place and would learn that instead of the people."""

    walls: tuple[Color, ...]
    floors: tuple[Color, ...]
    style: str
    """panels, bricks or windows."""
    clutter: float
    """Mean number of things and passers-by behind the person."""
    occlusion: float
    """Share of pictures with something in front of the person."""
    light: Range
    """Brightness of a picture."""


@dataclass(frozen=True)
class CameraSpec:
    """How far the cameras of a domain lie apart. Every camera draws its own values from these; the directions of the
    colour casts are spread evenly over the cameras, so that no two are alike by chance."""

    cast: Range
    """Strength of the colour cast: channel gains of 1 plus or minus this."""
    gamma: float
    """Logarithm of the strongest gamma, either way."""
    exposure: float
    """Logarithm of the strongest exposure, either way."""
    saturation: Range
    hue: float
    """Largest turn of the hue, in degrees, either way."""
    haze: Range
    """Share of grey mixed in."""
    blur: Range
    """Radius in units of the picture's height."""
    noise: Range
    """Standard deviation, in 0..1."""
    scale: Range
    """Height of a person of mean size in units of the picture's height."""
    view_spread: float
    """Spread (degrees) of the walking direction around a camera's main one; a share of pictures has any direction."""
    any_view: float
    """Share of pictures with any direction."""
    jpeg_quality: tuple[int, int]


@dataclass(frozen=True)
class DomainSpec:
    """A synthetic domain. `name` also names its streams of random numbers: domains of different names are different
    draws even where everything else is equal."""

    name: str
    people: PeopleSpec
    place: PlaceSpec
    cameras: CameraSpec


SOURCE = DomainSpec(
    name="source",
    people=PeopleSpec(
        saturation=(0.45, 1.0),
        value=(0.35, 1.0),
        neutral=0.15,
        patterns=(("plain", 0.85), ("logo", 0.1), ("blocks", 0.05)),
        lower_pattern=0.0,
        contrast=(0.3, 0.6),
        uppers=(("tee", 0.45), ("shirt", 0.3), ("jacket", 0.2), ("coat", 0.05)),
        lowers=(("trousers", 0.5), ("shorts", 0.25), ("skirt", 0.25)),
        hats=(("none", 0.7), ("cap", 0.2), ("beanie", 0.1)),
        bags=(("none", 0.55), ("backpack", 0.2), ("shoulder", 0.15), ("handbag", 0.1)),
    ),
    place=PlaceSpec(
        walls=((0.09, 0.25, 0.85), (0.55, 0.15, 0.6), (0.12, 0.1, 0.92), (0.6, 0.2, 0.4), (0.03, 0.35, 0.5)),
        floors=((0.1, 0.12, 0.75), (0.08, 0.2, 0.55), (0.6, 0.05, 0.4)),
        style="panels",
        clutter=1.5,
        occlusion=0.1,
        light=(0.75, 1.1),
    ),
    cameras=CameraSpec(
        cast=(0.03, 0.1),
        gamma=0.12,
        exposure=0.1,
        saturation=(0.85, 1.1),
        hue=6.0,
        haze=(0.0, 0.06),
        blur=(0.0, 0.006),
        noise=(0.005, 0.02),
        scale=(0.8, 0.9),
        view_spread=35.0,
        any_view=0.3,
        jpeg_quality=(85, 95),
    ),
)

# A background that differs much from picture to picture is an easier sign of an exemplar than the person in front of
# it, and exemplar-invariance then learns backgrounds: the target's are one family, dull and alike, unlike the source's.
TARGET = DomainSpec(
    name="target",
    people=PeopleSpec(
        saturation=(0.12, 0.55),
        value=(0.15, 0.9),
        neutral=0.15,
        patterns=(
            ("plain", 0.1),
            ("stripes", 0.2),
            ("bars", 0.18),
            ("checks", 0.18),
            ("dots", 0.14),
            ("blocks", 0.1),
            ("logo", 0.1),
        ),
        lower_pattern=0.5,
        contrast=(0.35, 0.65),
        uppers=(("tee", 0.2), ("shirt", 0.3), ("jacket", 0.3), ("coat", 0.2)),
        lowers=(("trousers", 0.65), ("shorts", 0.1), ("skirt", 0.25)),
        hats=(("none", 0.7), ("cap", 0.12), ("beanie", 0.18)),
        bags=(("none", 0.4), ("backpack", 0.3), ("shoulder", 0.2), ("handbag", 0.1)),
    ),
    place=PlaceSpec(
        walls=((0.6, 0.12, 0.5), (0.05, 0.25, 0.5), (0.1, 0.08, 0.6)),
        floors=((0.6, 0.05, 0.5), (0.1, 0.08, 0.55)),
        style="bricks",
        clutter=1.0,
        occlusion=0.08,
        light=(0.9, 1.05),
    ),
    cameras=CameraSpec(
        cast=(0.1, 0.2),
        gamma=0.26,
        exposure=0.15,
        saturation=(0.8, 1.1),
        hue=5.0,
        haze=(0.0, 0.08),
        blur=(0.0, 0.007),
        noise=(0.005, 0.02),
        scale=(0.82, 0.92),
        view_spread=28.0,
        any_view=0.1,
        jpeg_quality=(75, 92),
    ),
)

PRESETS = {spec.name: spec for spec in (SOURCE, TARGET)}
