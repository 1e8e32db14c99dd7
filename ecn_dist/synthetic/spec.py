"""What a synthetic domain is: a distribution of people, a family of places, a range of cameras."""

from dataclasses import dataclass, replace

Range = tuple[float, float]
Color = tuple[float, float, float]  # hue, saturation, value, each in 0..1


@dataclass(frozen=True)
class PeopleSpec:
    """How the people of a domain look. Clothes' colours are drawn in hue, saturation and value."""

    saturation: Range
    value: Range
    neutral: float  # share of garments that are black, grey or white
    plain_uppers: float  # share of upper garments without a pattern
    plain_lowers: float
    contrast: Range  # how far a pattern's second colour stands off the first, in value
    short_sleeves: float
    shorts: float


@dataclass(frozen=True)
class PlaceSpec:
    """The family of backgrounds, shared by all cameras of a domain: were each camera to have a place of its own, a
    network could tell the cameras apart by the place and would learn that instead of the people."""

    walls: tuple[Color, ...]
    floors: tuple[Color, ...]
    clutter: float  # mean number of things behind the person
    occlusion: float  # share of pictures with something in front of the person
    light: Range  # brightness of a picture


@dataclass(frozen=True)
class CameraSpec:
    """How far the cameras of a domain lie apart, each property spread evenly over them (`camera.draw_camera`)."""

    cast: Range  # of colour: channel gains are 1 plus or minus this, in a direction of the camera's own
    gamma: float  # logarithm of the strongest gamma, either way
    exposure: float  # logarithm of the strongest exposure, either way
    saturation: Range
    hue: float  # largest turn of the hue, in degrees, either way
    haze: Range  # share of grey mixed in
    blur: Range  # standard deviation in units of the picture's height
    noise: Range  # standard deviation, in 0..1
    scale: float  # height of a person of mean size in units of the picture's height
    yaw: float  # spread (degrees) of the walking direction around a camera's main one
    any_view: float  # share of pictures with any direction
    jpeg_quality: Range


@dataclass(frozen=True)
class DomainSpec:
    """A synthetic domain. `name` also names its random numbers: domains of different names are different draws even
    where everything else is equal."""

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
        plain_uppers=0.85,
        plain_lowers=1.0,
        contrast=(0.3, 0.6),
        short_sleeves=0.55,
        shorts=0.3,
    ),
    place=PlaceSpec(
        walls=((0.09, 0.25, 0.85), (0.55, 0.15, 0.6), (0.12, 0.1, 0.92), (0.6, 0.2, 0.4), (0.03, 0.35, 0.5)),
        floors=((0.1, 0.12, 0.75), (0.08, 0.2, 0.55), (0.6, 0.05, 0.4)),
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
        scale=0.85,
        yaw=35.0,
        any_view=0.3,
        jpeg_quality=(85, 95),
    ),
)

# A background that differs much from picture to picture is an easier sign of an exemplar than the person in front of
# it, and exemplar-invariance then learns backgrounds: the target's are one family, dull and alike, unlike the source's.
TARGET = DomainSpec(
    name="target",
    people=PeopleSpec(
        saturation=(0.1, 0.5),
        value=(0.15, 0.9),
        neutral=0.15,
        plain_uppers=0.1,
        plain_lowers=0.5,
        contrast=(0.3, 0.55),
        short_sleeves=0.25,
        shorts=0.1,
    ),
    place=PlaceSpec(
        walls=((0.6, 0.12, 0.5), (0.05, 0.25, 0.5), (0.1, 0.08, 0.6)),
        floors=((0.6, 0.05, 0.5), (0.1, 0.08, 0.55)),
        clutter=1.0,
        occlusion=0.12,
        light=(0.85, 1.1),
    ),
    cameras=CameraSpec(
        cast=(0.11, 0.22),
        gamma=0.29,
        exposure=0.18,
        saturation=(0.8, 1.1),
        hue=7.0,
        haze=(0.0, 0.08),
        blur=(0.0, 0.007),
        noise=(0.005, 0.02),
        scale=0.87,
        yaw=30.0,
        any_view=0.1,
        jpeg_quality=(75, 92),
    ),
)


def _strong(spec: DomainSpec) -> DomainSpec:
    """The domain with cameras that mix colours, blur and haze strongly: no curve of each channel alone undoes that."""
    cameras = replace(spec.cameras, hue=40.0, saturation=(0.45, 1.25), haze=(0.0, 0.35), blur=(0.0, 0.02))
    return replace(spec, name=f"{spec.name}-strong", cameras=cameras)


PRESETS = {spec.name: spec for spec in (SOURCE, TARGET, _strong(SOURCE), _strong(TARGET))}
