"""Where the parts of a person are in a picture.

Body coordinates are in units of the person's height: x to the person's left, y up from the floor, z ahead. A yaw of 0
looks at the viewer; at 90 degrees the person walks to the right of the picture.
"""

import math
from dataclasses import dataclass

from ecn_dist.synthetic.canvas import Canvas, Point
from ecn_dist.synthetic.draws import Draws
from ecn_dist.synthetic.patterns import cloth
from ecn_dist.synthetic.people import Person

Joint = tuple[float, float, float]

HIP, WAIST, SHOULDER, NECK, HEAD = 0.50, 0.62, 0.80, 0.845, 0.915
"""Heights on the body."""
THIGH, SHIN, SOLE = 0.24, 0.22, 0.035
"""Lengths of the leg's bones, and the height of the ankle of a foot on the floor."""


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


class Stance:
    """A person in a pose on a canvas: the projection of the body, and the paint of the clothes."""

    def __init__(self, canvas: Canvas, person: Person, pose: Pose) -> None:
        self.canvas, self.person, self.pose = canvas, person, pose
        self.unit = pose.unit * person.height
        """Pixels of this person's height."""
        angle = math.radians(pose.yaw)
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        self.legs = {side: self._leg_joints(side) for side in (-1, 1)}
        """Hip, knee and ankle of the right (-1) and left (1) leg."""
        self.sink = min(ankle[1] for _, _, ankle in self.legs.values()) - SOLE
        """How far the body comes down for the lower foot to stand on the floor."""
        x, y = self.project((0.0, SHOULDER, 0.0))
        anchor = (x + 0.05 * self.sin * self.unit, y)
        squeeze = max(0.45, abs(self.cos))
        self.upper_paint = cloth(person.upper, canvas.size, anchor, self.unit, squeeze)
        self.lower_paint = cloth(person.lower, canvas.size, anchor, self.unit, squeeze)

    def project(self, joint: Joint) -> Point:
        """The pixel position of a point of the body."""
        x, y, z = joint
        across = x * self.cos + z * self.sin + self.pose.lean * y
        return self.pose.feet[0] + across * self.unit, self.pose.feet[1] - (y - self.sink) * self.unit

    def _leg_joints(self, side: int) -> tuple[Joint, Joint, Joint]:
        person, pose = self.person, self.pose
        swing = 0.5 * pose.stride * math.sin(pose.phase) * side
        bend = 0.12 + 0.55 * pose.stride * max(0.0, side * math.cos(pose.phase))
        hip = (0.05 * person.hips * person.width * side, HIP, 0.0)
        knee = swung(hip, swing, THIGH * person.legs)
        return hip, knee, swung(knee, swing - bend, SHIN * person.legs)

    def half_width(self, front: float, depth: float) -> float:
        """Half the seen width in pixels of an elliptical section, given its half width and half depth."""
        return math.hypot(front * self.cos, depth * self.sin) * self.person.width * self.unit


def swung(joint: Joint, angle: float, length: float, aside: float = 0.0) -> Joint:
    """The far end of a bone that hangs from `joint`, swung forward by `angle` and aside by a slope."""
    x, y, z = joint
    return x + aside * length, y - math.cos(angle) * length, z + math.sin(angle) * length
