"""A walking person, drawn back to front: joints in three dimensions, projected and clothed in rounded shapes."""

import math

from ecn_dist.synthetic import bags, head
from ecn_dist.synthetic.canvas import Point
from ecn_dist.synthetic.draws import shaded
from ecn_dist.synthetic.stance import HIP, NECK, SHIN, SHOULDER, THIGH, WAIST, Stance, swung

UPPER_ARM, FOREARM = 0.165, 0.15
_HEMS = {"coat": HIP - 0.15, "jacket": HIP + 0.005, "shirt": HIP - 0.005, "tee": HIP + 0.02}


def draw_figure(stance: Stance) -> None:
    """Draw the whole person on the stance's canvas; what lies on the far side comes first."""
    far = 1 if stance.sin > 0 else -1
    bags.draw_behind(stance)
    _arm(stance, far)
    _leg(stance, far)
    _leg(stance, -far)
    head.draw_hair_behind(stance)
    _hips(stance)
    _torso(stance)
    bags.draw_before(stance)
    head.draw_head(stance)
    _arm(stance, -far)


def _leg(stance: Stance, side: int) -> None:
    person, unit, canvas = stance.person, stance.unit, stance.canvas
    hip, knee, ankle = stance.legs[side]
    heel = (ankle[0], ankle[1] - 0.018, ankle[2] - 0.01)
    toe = (ankle[0], ankle[1] - 0.02, ankle[2] + 0.075)
    thick = 0.5 * (1 + person.width) * unit
    trousers = person.lower.kind == "trousers"
    loose = 1.15 if trousers else 0.85
    joints = [stance.project(joint) for joint in (hip, knee, ankle)]
    canvas.limb([stance.project(heel), stance.project(toe)], [0.021 * unit, 0.018 * unit], person.shoes)
    radii = [0.056 * thick, 0.038 * thick * loose, 0.029 * thick * loose]
    canvas.limb(joints, radii, stance.lower_paint if trousers else person.skin)
    if person.lower.kind == "shorts":
        (x, y), (knee_x, knee_y) = joints[:2]
        share = 0.3 + 1.3 * person.lower_length
        hem = (x + share * (knee_x - x), y + share * (knee_y - y))
        canvas.limb([joints[0], hem], [0.058 * thick, 0.052 * thick], stance.lower_paint)


def _hips(stance: Stance) -> None:
    """The hips, with the skirt where there is one."""
    person, pose = stance.person, stance.pose
    hips = stance.half_width(0.098 * person.hips, 0.075)
    drop, flare = HIP - 0.03, 1.0
    if person.lower.kind == "skirt":
        drop = HIP - (THIGH + SHIN) * person.legs * person.lower_length
        flare = 1.15 + 0.25 * person.lower_length + 0.2 * abs(stance.sin) * pose.stride
    top, middle, hem = (stance.project((0.0, height, 0.0)) for height in (WAIST - 0.03, HIP, drop))
    sway = 0.02 * stance.unit * math.sin(pose.phase) * stance.sin
    right = [(top[0] + 0.9 * hips, top[1]), (middle[0] + hips, middle[1]), (hem[0] + sway + flare * hips, hem[1])]
    left = [(hem[0] + sway - flare * hips, hem[1]), (middle[0] - hips, middle[1]), (top[0] - 0.9 * hips, top[1])]
    stance.canvas.body(right + left, stance.lower_paint, middle[0])


def _torso(stance: Stance) -> None:
    person, unit, canvas = stance.person, stance.unit, stance.canvas
    wide = person.upper.kind in ("coat", "jacket")
    levels = (NECK, SHOULDER + 0.018, SHOULDER - 0.02, WAIST, _HEMS[person.upper.kind])
    centers = [stance.project((0.0, level, 0.0)) for level in levels]
    shoulder = stance.half_width(0.122 * person.shoulders, 0.075)
    waist = stance.half_width(0.095, 0.08)
    hem = stance.half_width(0.102 * person.hips, 0.083) * (1.15 if person.upper.kind == "coat" else 1.0)
    bulk = 1.1 if wide else 1.0
    halves = [0.035 * unit, 0.8 * shoulder * bulk, shoulder * bulk, waist * bulk, hem * bulk]
    right = [(x + half, y) for (x, y), half in zip(centers, halves, strict=True)]
    left = [(x - half, y) for (x, y), half in zip(centers, halves, strict=True)]
    chin = stance.project((0.0, NECK + 0.04, 0.01))
    canvas.limb([centers[0], chin], [0.03 * unit, 0.028 * unit], shaded(person.skin, 0.9))
    canvas.body(right + left[::-1], stance.upper_paint, centers[3][0])
    if stance.cos > 0.15:
        _front(stance, centers[0], centers[4])


def _front(stance: Stance, neck: Point, hem: Point) -> None:
    """What only the front shows: an open jacket, a collar, buttons, a print."""
    person, unit, canvas = stance.person, stance.unit, stance.canvas
    x, reach = hem[0] + 0.07 * stance.sin * unit, 0.035 * stance.cos * unit
    collar, depth = neck[1] - 0.004 * unit, neck[1] + 0.035 * unit
    if person.upper.kind in ("jacket", "coat"):
        top = [(neck[0] - reach, collar), (neck[0] + reach, collar)]
        canvas.flat([*top, (x + 1.2 * reach, hem[1]), (x - 1.2 * reach, hem[1])], person.inner)
    canvas.flat([(neck[0] - reach, collar), (neck[0] + reach, collar), (x, depth)], person.skin)
    if person.upper.kind == "shirt":
        canvas.strap((x, depth), (x, hem[1]), 0.006 * unit, shaded(person.upper.color, 0.75))
    if person.upper.pattern == "logo":
        y, half = neck[1] + 0.11 * unit, 0.055 * stance.cos * unit
        canvas.flat(
            [(x - half, y - 0.04 * unit), (x + half, y - 0.04 * unit), (x, y + 0.055 * unit)], person.upper.second
        )


def _arm(stance: Stance, side: int) -> None:
    person, pose, canvas = stance.person, stance.pose, stance.canvas
    swing = -0.45 * pose.stride * math.sin(pose.phase) * side
    shoulder = (0.112 * person.shoulders * person.width * side, SHOULDER - 0.018, 0.0)
    elbow = swung(shoulder, swing, UPPER_ARM, 0.09 * side)
    wrist = swung(elbow, swing + 0.35, FOREARM, 0.03 * side)
    thick = 0.5 * (1 + person.width) * stance.unit
    joints = [stance.project(joint) for joint in (shoulder, elbow, wrist)]
    if side == bags.HAND:
        bags.draw_in_hand(stance, joints[2])
    canvas.ball(joints[2], 0.023 * thick, 0.027 * thick, person.skin)
    bulk = thick * (1.15 if person.upper.kind in ("coat", "jacket") else 1.0)
    radii = [0.036 * bulk, 0.03 * bulk, 0.022 * bulk]
    canvas.limb(joints, radii, stance.upper_paint if person.long_sleeves else person.skin)
    if not person.long_sleeves:
        (x, y), (elbow_x, elbow_y) = joints[:2]
        hem = (x + 0.55 * (elbow_x - x), y + 0.55 * (elbow_y - y))
        canvas.limb([joints[0], hem], [0.038 * thick, 0.037 * thick], stance.upper_paint)
