"""People: what stays with one from camera to camera, and how one is drawn, from a dozen capsules.

Body coordinates are in units of the person's height: x to the person's left, y up from the floor, z ahead. A yaw of 0
looks at the viewer; at 90 degrees the person walks to the right of the picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from ecn_dist.synthetic.numbers import RGB, Numbers, rgb, shaded
from ecn_dist.synthetic.spec import PeopleSpec

Point = tuple[float, float]
Joint = tuple[float, float, float]
Paint = RGB | Image.Image  # a colour, or a picture of the canvas's size that shows through the shape

SKINS = ((0.07, 0.28, 0.95), (0.07, 0.38, 0.85), (0.06, 0.48, 0.68), (0.05, 0.55, 0.48), (0.05, 0.55, 0.34))
HAIRS = ((0.08, 0.4, 0.1), (0.07, 0.55, 0.25), (0.06, 0.6, 0.4), (0.11, 0.5, 0.75), (0.1, 0.04, 0.68))
HIP, WAIST, SHOULDER, NECK, HEAD = 0.50, 0.62, 0.80, 0.845, 0.915  # heights on the body
THIGH, SHIN, UPPER_ARM, FOREARM, SOLE = 0.24, 0.22, 0.165, 0.15, 0.035  # lengths of bones; of an ankle over the floor


@dataclass(frozen=True)
class Garment:
    """A piece of clothing in one or two colours. `period` is the pattern's, in units of the person's height."""

    pattern: str
    color: RGB
    second: RGB
    period: float


@dataclass(frozen=True)
class Person:
    """One identity."""

    height: float  # a factor on the mean person's, as is the width
    width: float
    skin: RGB
    hair: RGB
    long_hair: bool
    upper: Garment
    sleeves: float  # how much of the arms they cover
    lower: Garment
    covered: float  # how much of the legs trousers or a skirt cover
    skirt: bool
    shoes: RGB


def draw_person(spec: PeopleSpec, numbers: Numbers) -> Person:
    """Draw one identity from a domain's distribution."""
    skirt = numbers.chance(0.25)
    return Person(
        height=1 + numbers.normal(0.045),
        width=numbers.uniform((0.85, 1.25)),
        skin=numbers.color(SKINS, 0.03),
        hair=numbers.color(HAIRS, 0.04),
        long_hair=numbers.chance(0.4),
        upper=_draw_garment(spec, numbers, 1 - spec.plain_uppers),
        sleeves=numbers.uniform((0.2, 0.4)) if numbers.chance(spec.short_sleeves) else 1.0,
        lower=_draw_garment(spec, numbers, 1 - spec.plain_lowers),
        covered=numbers.uniform((0.3, 0.7)) if skirt or numbers.chance(spec.shorts) else 1.0,
        skirt=skirt,
        shoes=rgb((numbers.fraction(), numbers.uniform((0.0, 0.6)), numbers.uniform((0.08, 0.95)))),
    )


def _draw_garment(spec: PeopleSpec, numbers: Numbers, patterned: float) -> Garment:
    neutral = numbers.chance(spec.neutral)
    hue = numbers.fraction()
    saturation = numbers.uniform((0.0, 0.08) if neutral else spec.saturation)
    value = numbers.uniform((0.08, 0.95) if neutral else spec.value)
    contrast = numbers.uniform(spec.contrast)
    second = (
        hue + (numbers.normal(0.15) if numbers.chance(0.5) else 0.0),
        saturation * numbers.uniform((0.4, 1.1)),
        value + contrast if value < 0.5 else value - contrast,
    )
    pattern = tuple(PATTERNS)[int(numbers.fraction() * len(PATTERNS))] if numbers.chance(patterned) else "plain"
    return Garment(pattern, rgb((hue, saturation, value)), rgb(second), numbers.uniform((0.045, 0.1)))


PATTERNS = {
    "stripes": lambda x, y: y % 1 < 0.45,
    "bars": lambda x, y: x % 1 < 0.4,
    "checks": lambda x, y: (x % 1 < 0.5) ^ (y % 1 < 0.5),
    "blocks": lambda x, y: y > 2,
}
"""Where a garment has its second colour: x and y in periods, across and down from the middle of the shoulders."""


class Figure:
    """A person in a pose, drawn on a picture: `yaw` in degrees, `phase` of the stride in radians, `stride` its reach;
    in pixels where the floor is under the person (`feet`), and the mean person's height (`unit`)."""

    def __init__(
        self, picture: Image.Image, person: Person, yaw: float, phase: float, stride: float, feet: Point, unit: float
    ) -> None:
        self.picture, self.person, self.feet, self.unit = picture, person, feet, unit * person.height
        self.cos, self.sin = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
        self.phase, self.stride = phase, stride
        self.sink = 0.0
        self.legs = {side: self._leg_joints(side) for side in (-1, 1)}
        self.sink = min(ankle[1] for _, _, ankle in self.legs.values()) - SOLE  # until a foot is on the floor
        self.upper, self.lower = self._cloth(person.upper), self._cloth(person.lower)

    def draw(self) -> None:
        """Draw it all; what lies on the far side comes first."""
        person, far = self.person, 1 if self.sin > 0 else -1
        self._arm(far)
        self._leg(far)
        self._leg(-far)
        hair = [(0.0, HEAD + 0.01, -0.02), (0.0, SHOULDER - 0.04, -0.07)]
        if person.long_hair and self.cos > 0:
            self._limb(hair, [0.058, 0.05], person.hair)
        self._torso()
        self._limb([(0.0, NECK - 0.02, 0.0), (0.0, NECK + 0.04, 0.01)], [0.03, 0.028], shaded(person.skin, 0.9))
        self._limb([(0.0, HEAD - 0.02, 0.01), (0.0, HEAD + 0.015, 0.0)], [0.043, 0.05], person.skin)
        self._limb([(0.0, HEAD + 0.03, 0.0), (0.0, HEAD + 0.005, -0.04)], [0.051, 0.045], person.hair)
        if person.long_hair and self.cos <= 0:
            self._limb(hair, [0.058, 0.05], person.hair)
        self._arm(-far)

    def _torso(self) -> None:
        """Hips, or a skirt, and above them the upper garment."""
        bottom = HIP - max(0.03, (THIGH + SHIN) * self.person.covered * self.person.skirt)
        flare = 1 + 0.6 * (HIP - bottom)
        self._outline([(WAIST, 0.09, 0.07), (HIP, 0.098, 0.08), (bottom, 0.098 * flare, 0.085 * flare)], self.lower)
        levels = [(NECK, 0.035, 0.035), (SHOULDER + 0.018, 0.1, 0.06), (SHOULDER - 0.02, 0.122, 0.075)]
        self._outline([*levels, (WAIST, 0.1, 0.08), (HIP + 0.01, 0.102, 0.083)], self.upper)

    def _leg(self, side: int) -> None:
        hip, knee, ankle = self.legs[side]
        self._limb([ankle, (ankle[0], ankle[1] - 0.018, ankle[2] + 0.07)], [0.024, 0.019], self.person.shoes)
        self._limb([hip, knee, ankle], [0.052, 0.034, 0.025], self.person.skin)
        if not self.person.skirt:
            self._limb(_first_part([hip, knee, ankle], self.person.covered), [0.058, 0.044, 0.034], self.lower)

    def _arm(self, side: int) -> None:
        swing = -0.45 * self.stride * math.sin(self.phase) * side
        shoulder = (0.112 * side, SHOULDER - 0.018, 0.0)
        elbow = _swung(shoulder, swing, UPPER_ARM, 0.09 * side)
        arm = [shoulder, elbow, _swung(elbow, swing + 0.35, FOREARM, 0.03 * side)]
        self._limb(arm, [0.03, 0.027, 0.023], self.person.skin)
        self._limb(_first_part(arm, min(self.person.sleeves, 0.93)), [0.038, 0.033, 0.027], self.upper)

    def _leg_joints(self, side: int) -> tuple[Joint, Joint, Joint]:
        swing = 0.5 * self.stride * math.sin(self.phase) * side
        bend = 0.12 + 0.55 * self.stride * max(0.0, side * math.cos(self.phase))
        hip = (0.05 * side, HIP, 0.0)
        knee = _swung(hip, swing, THIGH)
        return hip, knee, _swung(knee, swing - bend, SHIN)

    def _project(self, joint: Joint) -> Point:
        """The pixel position of a point of the body."""
        x, y, z = joint
        across = x * self.person.width * self.cos + z * self.sin
        return self.feet[0] + across * self.unit, self.feet[1] - (y - self.sink) * self.unit

    def _cloth(self, garment: Garment) -> Paint:
        """The garment's paint. Its pattern moves with the wearer, and narrows where the body is turned."""
        if garment.pattern == "plain":
            return garment.color
        x0, y0 = self._project((0.0, SHOULDER, 0.0))
        down, across = garment.period * self.unit, garment.period * self.unit * max(0.45, abs(self.cos))
        y, x = np.mgrid[: self.picture.height, : self.picture.width]
        second = PATTERNS[garment.pattern]((x - x0) / across, (y - y0) / down)
        return Image.fromarray(np.where(second[..., None], garment.second, garment.color).astype(np.uint8))

    def _limb(self, joints: Sequence[Joint], radii: Sequence[float], paint: Paint) -> None:
        """Rounded bars through `joints`, tapered between their `radii`."""
        thick = 0.5 * (1 + self.person.width) * self.unit
        ends = [(self._project(joint), radius * thick) for joint, radius in zip(joints, radii, strict=False)]
        for (start, radius), (end, end_radius) in pairwise(ends):
            self._fill(_capsule(start, end, radius, end_radius), paint)

    def _outline(self, levels: Sequence[tuple[float, float, float]], paint: Paint) -> None:
        """A shape of elliptical sections, from (height, half width, half depth) of each."""
        left, right = [], []
        for height, half_width, half_depth in levels:
            x, y = self._project((0.0, height, 0.0))
            half = math.hypot(half_width * self.cos, half_depth * self.sin) * self.person.width * self.unit
            left.append((x - half, y))
            right.append((x + half, y))
        self._fill(left + right[::-1], paint)

    def _fill(self, outline: Sequence[Point], paint: Paint) -> None:
        if isinstance(paint, Image.Image):
            stencil = Image.new("1", self.picture.size)
            ImageDraw.Draw(stencil).polygon(outline, fill=1)
            self.picture.paste(paint, mask=stencil)
        else:
            ImageDraw.Draw(self.picture).polygon(outline, fill=paint)


def _swung(joint: Joint, angle: float, length: float, aside: float = 0.0) -> Joint:
    """The far end of a bone that hangs from `joint`, swung forward by `angle` and aside by a slope."""
    x, y, z = joint
    return x + aside * length, y - math.cos(angle) * length, z + math.sin(angle) * length


def _first_part(joints: Sequence[Joint], share: float) -> list[Joint]:
    """The first `share` of two bones."""
    bone = 0 if share <= 0.5 else 1
    along = 2 * share - bone
    start, end = joints[bone], joints[bone + 1]
    x, y, z = (a + along * (b - a) for a, b in zip(start, end, strict=True))
    return [*joints[: bone + 1], (x, y, z)]


def _capsule(start: Point, end: Point, radius: float, end_radius: float) -> list[Point]:
    """The outline of a bar with round ends, as half a polygonal circle at each end."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    outline = []
    for step in range(14):
        turn = angle + math.pi / 2 + math.pi * (step if step < 7 else step - 1) / 6
        (x, y), r = (start, radius) if step < 7 else (end, end_radius)
        outline.append((x + r * math.cos(turn), y + r * math.sin(turn)))
    return outline
