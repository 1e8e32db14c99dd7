"""A walking person, drawn back to front: joints in three dimensions, turned and projected, clothed in rounded shapes.

Body coordinates are in units of the person's height: x to the person's left, y up from the floor, z ahead. A yaw of 0
looks at the viewer; at 90 degrees the person walks to the right of the picture.
"""

import math
from dataclasses import dataclass

from ecn_dist.data.synthetic.canvas import Canvas, Paint, Point
from ecn_dist.data.synthetic.draws import Draws, shaded
from ecn_dist.data.synthetic.patterns import cloth
from ecn_dist.data.synthetic.people import Person

Joint = tuple[float, float, float]

HIP, SHOULDER, WAIST, NECK, HEAD = 0.50, 0.80, 0.62, 0.845, 0.915
THIGH, SHIN, UPPER_ARM, FOREARM = 0.24, 0.22, 0.165, 0.15


@dataclass(frozen=True)
class Pose:
    """How a person stands in one picture: `yaw` in degrees, `phase` of the stride in radians, `stride` its reach."""

    yaw: float
    phase: float
    stride: float
    lean: float
    """Sideways, in units of the person's height at the head."""
    feet: Point
    """Where the floor is under the person, in pixels."""
    unit: float
    """Pixels of the mean person's height."""


def draw_pose(draws: Draws, yaw: float, feet: Point, unit: float) -> Pose:
    """A moment of a walk."""
    return Pose(yaw, draws.uniform((0, math.tau)), draws.uniform((0.1, 1.0)), draws.normal(0.008), feet, unit)


class Figure:
    """One person in one pose on a canvas."""

    def __init__(self, canvas: Canvas, person: Person, pose: Pose) -> None:
        self.canvas, self.person, self.pose = canvas, person, pose
        self.unit = pose.unit * person.height
        angle = math.radians(pose.yaw)
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        self.bob = 0.012 * pose.stride * math.cos(2 * pose.phase)
        self.squeeze = max(0.45, abs(self.cos))
        origin = self.project((0.0, SHOULDER, 0.0))
        shift = 0.05 * self.sin * self.unit
        anchor = (origin[0] + shift, origin[1])
        self.upper_paint = cloth(person.upper, canvas.size, anchor, self.unit, self.squeeze)
        self.lower_paint = cloth(person.lower, canvas.size, anchor, self.unit, self.squeeze)

    def project(self, joint: Joint) -> Point:
        x, y, z = joint
        across = x * self.cos + z * self.sin + self.pose.lean * y
        return self.pose.feet[0] + across * self.unit, self.pose.feet[1] - (y + self.bob) * self.unit

    def half_width(self, front: float, depth: float) -> float:
        """Half the seen width in pixels of an elliptical section, given its half width and half depth."""
        return math.hypot(front * self.cos, depth * self.sin) * self.person.width * self.unit

    def draw(self) -> None:
        """The whole person. What lies on the far side comes first."""
        far = 1 if self.sin > 0 else -1
        ahead = self.cos > 0
        if self.person.bag == "backpack" and ahead:
            self.backpack()
        self.arm(far)
        for side in (far, -far):
            self.leg(side)
        self.lower_body()
        self.torso()
        if self.person.bag == "backpack":
            if ahead:
                self._straps()
            else:
                self.backpack()
        if self.person.bag == "shoulder":
            self.shoulder_bag()
        self.head()
        self.arm(-far)

    def leg(self, side: int) -> None:
        person, unit = self.person, self.unit
        swing = 0.5 * self.pose.stride * math.sin(self.pose.phase) * side
        bend = 0.15 + 0.55 * self.pose.stride * max(0.0, side * math.cos(self.pose.phase))
        hip = (0.05 * person.hips * person.width * side, HIP, 0.0)
        knee = _swung(hip, swing, THIGH * person.legs)
        ankle = _swung(knee, swing - bend, SHIN * person.legs)
        ankle = (ankle[0], max(ankle[1], 0.035), ankle[2])
        toe = (ankle[0], max(0.012, ankle[1] - 0.025), ankle[2] + 0.075)
        thick = 0.5 * (1 + person.width)
        hip_p, knee_p, ankle_p = self.project(hip), self.project(knee), self.project(ankle)
        heel_p, toe_p = self.project((ankle[0], ankle[1] - 0.018, ankle[2] - 0.01)), self.project(toe)
        trousers = person.lower.kind == "trousers"
        thigh_paint: Paint = self.lower_paint if trousers else person.skin
        loose = 1.12 if trousers else 0.85
        self.canvas.limb(heel_p, toe_p, 0.021 * unit, 0.018 * unit, person.shoes)
        radii = (0.056 * thick * unit, 0.038 * thick * loose * unit, 0.029 * thick * loose * unit)
        self.canvas.limb(knee_p, ankle_p, radii[1], radii[2], thigh_paint)
        self.canvas.limb(hip_p, knee_p, radii[0], radii[1], thigh_paint)
        if person.lower.kind == "shorts":
            share = 0.35 + 0.65 * person.lower_length / 0.5
            hem = (hip_p[0] + share * (knee_p[0] - hip_p[0]), hip_p[1] + share * (knee_p[1] - hip_p[1]))
            self.canvas.limb(hip_p, hem, 0.06 * thick * unit, 0.056 * thick * unit, self.lower_paint)

    def lower_body(self) -> None:
        """The hips, with the skirt where there is one."""
        person = self.person
        top = self.project((0.0, WAIST - 0.03, 0.0))
        hips = self.half_width(0.098 * person.hips, 0.075)
        waist = 0.9 * hips
        drop, flare = HIP - 0.03, 1.0
        if person.lower.kind == "skirt":
            drop = HIP - (THIGH + SHIN) * person.legs * person.lower_length
            flare = 1.15 + 0.25 * person.lower_length + 0.2 * abs(self.sin) * self.pose.stride
        hem = self.project((0.0, drop, 0.0))
        mid = self.project((0.0, HIP, 0.0))
        sway = 0.02 * self.unit * math.sin(self.pose.phase) * self.sin
        outline = [
            (top[0] - waist, top[1]),
            (top[0] + waist, top[1]),
            (mid[0] + hips, mid[1]),
            (hem[0] + sway + flare * hips, hem[1]),
            (hem[0] + sway - flare * hips, hem[1]),
            (mid[0] - hips, mid[1]),
        ]
        self.canvas.body(outline, self.lower_paint, mid[0])

    def torso(self) -> None:
        person, unit, canvas = self.person, self.unit, self.canvas
        coat = person.upper.kind == "coat"
        bottom = {"coat": HIP - 0.15, "jacket": HIP + 0.005, "shirt": HIP - 0.005, "tee": HIP + 0.02}[person.upper.kind]
        neck, shoulder = self.project((0.0, NECK, 0.0)), self.project((0.0, SHOULDER, 0.0))
        waist, hem = self.project((0.0, WAIST, 0.0)), self.project((0.0, bottom, 0.0))
        bulk = 1.1 if person.upper.kind in ("coat", "jacket") else 1.0
        at_shoulder = self.half_width(0.125 * person.shoulders, 0.075) * bulk
        at_waist = self.half_width(0.098, 0.08) * bulk
        at_hem = self.half_width(0.104 * person.hips, 0.085) * bulk * (1.12 if coat else 1.0)
        canvas.limb(neck, self.project((0.0, HEAD - 0.03, 0.01)), 0.03 * unit, 0.028 * unit, shaded(person.skin, 0.9))
        right = [
            (neck[0] + 0.035 * unit, neck[1]),
            (shoulder[0] + 0.8 * at_shoulder, shoulder[1] - 0.018 * unit),
            (shoulder[0] + at_shoulder, shoulder[1] + 0.02 * unit),
            (waist[0] + at_waist, waist[1]),
            (hem[0] + at_hem, hem[1]),
        ]
        left = [
            (neck[0] - 0.035 * unit, neck[1]),
            (shoulder[0] - 0.8 * at_shoulder, shoulder[1] - 0.018 * unit),
            (shoulder[0] - at_shoulder, shoulder[1] + 0.02 * unit),
            (waist[0] - at_waist, waist[1]),
            (hem[0] - at_hem, hem[1]),
        ]
        canvas.body([*right, *reversed(left)], self.upper_paint, waist[0])
        if self.cos > 0.15:
            self._front(neck, hem, waist)

    def _front(self, neck: Point, hem: Point, waist: Point) -> None:
        """What only the front shows: a collar, an open jacket, a print."""
        person, unit, canvas = self.person, self.unit, self.canvas
        x = waist[0] + 0.07 * self.sin * unit
        reach = 0.03 * self.cos * unit
        if person.upper.kind in ("jacket", "coat"):
            opening = [
                (neck[0] - reach, neck[1]),
                (neck[0] + reach, neck[1]),
                (x + 0.7 * reach, hem[1]),
                (x - 0.7 * reach, hem[1]),
            ]
            canvas.flat(opening, person.inner)
        collar = [
            (neck[0] - reach, neck[1] - 0.004 * unit),
            (neck[0] + reach, neck[1] - 0.004 * unit),
            (x, neck[1] + 0.035 * unit),
        ]
        canvas.flat(collar, person.skin)
        if person.upper.kind == "shirt":
            canvas.strap((x, neck[1] + 0.035 * unit), (x, hem[1]), 0.006 * unit, shaded(person.upper.color, 0.75))
        if person.upper.pattern == "logo":
            y, half = neck[1] + 0.11 * unit, 0.05 * self.cos * unit
            canvas.flat(
                [(x - half, y - 0.035 * unit), (x + half, y - 0.035 * unit), (x, y + 0.05 * unit)], person.upper.second
            )

    def arm(self, side: int) -> None:
        person, unit = self.person, self.unit
        swing = -0.45 * self.pose.stride * math.sin(self.pose.phase) * side
        shoulder = (0.122 * person.shoulders * person.width * side, SHOULDER - 0.012, 0.0)
        elbow = _swung(shoulder, swing, UPPER_ARM, 0.09 * side)
        wrist = _swung(elbow, swing + 0.35, FOREARM, 0.03 * side)
        thick = 0.5 * (1 + person.width) * unit
        bulk = 1.15 if person.upper.kind in ("coat", "jacket") else 1.0
        shoulder_p, elbow_p, wrist_p = (self.project(joint) for joint in (shoulder, elbow, wrist))
        sleeve = self.upper_paint if person.long_sleeves else person.skin
        if person.bag == "handbag" and side == -1:
            self._handbag(wrist_p)
        self.canvas.ball(wrist_p, 0.024 * unit, 0.028 * unit, person.skin)
        self.canvas.limb(elbow_p, wrist_p, 0.028 * thick * bulk, 0.022 * thick * bulk, sleeve)
        self.canvas.limb(shoulder_p, elbow_p, 0.036 * thick * bulk, 0.03 * thick * bulk, sleeve)
        if not person.long_sleeves:
            middle = ((shoulder_p[0] + elbow_p[0]) / 2, (shoulder_p[1] + elbow_p[1]) / 2)
            self.canvas.limb(shoulder_p, middle, 0.042 * thick, 0.042 * thick, self.upper_paint)

    def _handbag(self, hand: Point) -> None:
        unit, size, color = self.unit, self.person.bag_size, self.person.bag_color
        half, top, bottom = (
            math.hypot(0.035 * self.cos, 0.075 * self.sin) * size * unit,
            0.06 * unit,
            (0.06 + 0.1 * size) * unit,
        )
        x, y = hand
        for side in (-1, 1):
            self.canvas.strap((x, y), (x + 0.6 * side * half, y + top), 0.01 * unit, shaded(color, 0.7))
        outline = [(x - 0.8 * half, y + top), (x + 0.8 * half, y + top), (x + half, y + bottom), (x - half, y + bottom)]
        self.canvas.body(outline, color, x)

    def head(self) -> None:
        person, unit, canvas = self.person, self.unit, self.canvas
        center = self.project((0.0, HEAD, 0.015))
        wide, high = 0.05 * unit, 0.066 * unit
        long = person.hair_style in ("long", "bob")
        if long and self.cos > -0.2:
            drop = 0.09 if person.hair_style == "long" else 0.045
            x = center[0] - 0.02 * self.sin * unit
            canvas.limb((x, center[1]), (x, center[1] + drop * unit), 1.15 * wide, 1.0 * wide, person.hair)
        canvas.ball(center, wide, high, person.skin)
        if person.hair_style != "bald":
            self._hair(center, wide, high, long)
        if self.cos > 0.3:
            for side in (-1, 1):
                x = center[0] + (0.5 * self.sin + 0.38 * side * self.cos) * wide
                canvas.flat(_box(x, center[1] + 0.05 * high, 0.12 * wide, 0.08 * high), shaded(person.hair, 0.5))
        if person.hat != "none":
            self._hat(center, wide, high)

    def _hair(self, center: Point, wide: float, high: float, long: bool) -> None:
        person, canvas = self.person, self.canvas
        x = center[0] - 0.35 * self.sin * wide
        if self.cos < -0.2:
            canvas.ball((x, center[1] - 0.1 * high), 1.08 * wide, 1.0 * high, person.hair)
            if long:
                drop = 0.09 if person.hair_style == "long" else 0.045
                canvas.limb((x, center[1]), (x, center[1] + drop * self.unit), 1.1 * wide, 0.95 * wide, person.hair)
        else:
            canvas.ball((x, center[1] - 0.55 * high), 1.05 * wide, 0.55 * high, person.hair)
            if abs(self.sin) > 0.4:
                back = center[0] - 0.62 * math.copysign(wide, self.sin)
                canvas.ball((back, center[1] - 0.1 * high), 0.5 * wide, 0.8 * high, person.hair)
        if person.hair_style == "bun":
            behind = center[0] - 1.1 * self.sin * wide
            canvas.ball((behind, center[1] - 0.75 * high), 0.5 * wide, 0.4 * high, person.hair)

    def _hat(self, center: Point, wide: float, high: float) -> None:
        person, canvas = self.person, self.canvas
        x, y = center[0] - 0.05 * self.sin * wide, center[1] - 0.35 * high
        if person.hat == "cap" and self.cos > -0.3:
            brim = (center[0] + 1.1 * self.sin * wide, y + 0.1 * high)
            canvas.ball(brim, (0.9 * abs(self.cos) + 0.55) * wide, 0.16 * high, shaded(person.hat_color, 0.8))
        dome = [
            (x + 1.12 * wide * math.cos(turn), y - 0.85 * high * math.sin(turn))
            for turn in (math.pi * n / 10 for n in range(11))
        ]
        canvas.body([*dome, (x - 1.1 * wide, y + 0.12 * high), (x + 1.1 * wide, y + 0.12 * high)], person.hat_color, x)
        if person.hat == "beanie":
            rim = shaded(person.hat_color, 0.75)
            canvas.flat(_box(x, y + 0.02 * high, 1.12 * wide, 0.14 * high), rim)

    def backpack(self) -> None:
        person, unit = self.person, self.unit
        size = person.bag_size
        center = self.project((0.0, SHOULDER - 0.005 - 0.12 * size, -0.1))
        half = math.hypot(0.085 * size * self.cos, 0.06 * size * self.sin) * unit
        high = 0.12 * size * unit
        corner = 0.3 * half
        outline = [
            (center[0] - half, center[1] - high + corner),
            (center[0] - half + corner, center[1] - high),
            (center[0] + half - corner, center[1] - high),
            (center[0] + half, center[1] - high + corner),
            (center[0] + half, center[1] + high),
            (center[0] - half, center[1] + high),
        ]
        self.canvas.body(outline, person.bag_color, center[0])
        pocket = _box(center[0], center[1] + 0.5 * high, 0.7 * half, 0.3 * high)
        self.canvas.flat(pocket, shaded(person.bag_color, 0.75))

    def _straps(self) -> None:
        for side in (-1, 1):
            top = self.project((0.065 * side * self.person.width, SHOULDER + 0.02, 0.05))
            bottom = self.project((0.085 * side * self.person.width, SHOULDER - 0.16, 0.05))
            self.canvas.strap(top, bottom, 0.022 * self.unit, self.person.bag_color)

    def shoulder_bag(self) -> None:
        """A bag at the left hip on a strap over the right shoulder, seen from the front and from behind."""
        person, unit = self.person, self.unit
        near = 0.06 if self.cos > 0 else -0.06
        top = self.project((-0.07 * person.width, SHOULDER + 0.025, near * 0.5))
        hip = self.project((0.12 * person.width, HIP + 0.06, near))
        self.canvas.strap(top, hip, 0.018 * unit, person.bag_color)
        half = math.hypot(0.05 * self.cos, 0.07 * self.sin) * person.bag_size * unit
        box = _box(hip[0], hip[1] + 0.045 * unit, half, 0.055 * person.bag_size * unit)
        self.canvas.body(box, person.bag_color, hip[0])
        flap = _box(hip[0], hip[1] + 0.02 * unit, half, 0.025 * person.bag_size * unit)
        self.canvas.flat(flap, shaded(person.bag_color, 0.8))


def _swung(joint: Joint, angle: float, length: float, aside: float = 0.0) -> Joint:
    """The far end of a bone that hangs from `joint`, swung forward by `angle` and aside by a slope."""
    x, y, z = joint
    return x + aside * length, y - math.cos(angle) * length, z + math.sin(angle) * length


def _box(x: float, y: float, half_x: float, half_y: float) -> list[Point]:
    return [(x - half_x, y - half_y), (x + half_x, y - half_y), (x + half_x, y + half_y), (x - half_x, y + half_y)]
