"""Heads: face, hair and hat."""

import math

from ecn_dist.synthetic.canvas import Point, box
from ecn_dist.synthetic.draws import shaded
from ecn_dist.synthetic.stance import HEAD, Stance

_FALL = {"long": 0.1, "bob": 0.055}
"""How far hair hangs below the middle of the head, in units of the person's height."""


def draw_hair_behind(stance: Stance) -> None:
    """Long hair of a person who is seen from the front or the side, which the body hides in part."""
    if stance.cos > -0.2 and stance.person.hair_style in _FALL:
        _falling_hair(stance, -0.012, 1.18)


def draw_head(stance: Stance) -> None:
    """Everything above the neck; long hair over the back where that is seen."""
    person, canvas = stance.person, stance.canvas
    center, wide, high = _measures(stance)
    canvas.ball(center, wide, high, person.skin)
    if stance.cos > 0.3:
        _face(stance, center, wide, high)
    if person.hair_style != "bald":
        _hair(stance, center, wide, high)
    if person.hat != "none":
        _hat(stance, center, wide, high)


def _measures(stance: Stance) -> tuple[Point, float, float]:
    return stance.project((0.0, HEAD, 0.015)), 0.05 * stance.unit, 0.066 * stance.unit


def _falling_hair(stance: Stance, behind: float, spread: float) -> None:
    center, wide, _ = _measures(stance)
    x = center[0] + behind * stance.sin * stance.unit
    end = (x, center[1] + _FALL[stance.person.hair_style] * stance.unit)
    stance.canvas.limb([(x, center[1]), end], [spread * wide, 0.9 * spread * wide], stance.person.hair)


def _face(stance: Stance, center: Point, wide: float, high: float) -> None:
    person, canvas = stance.person, stance.canvas
    for side in (-1, 1):
        x = center[0] + (0.55 * stance.sin + 0.38 * side * stance.cos) * wide
        canvas.flat(box((x, center[1] + 0.02 * high), 0.11 * wide, 0.07 * high), shaded(person.hair, 0.5))
    mouth = (center[0] + 0.6 * stance.sin * wide, center[1] + 0.52 * high)
    canvas.flat(box(mouth, 0.22 * wide * stance.cos, 0.045 * high), shaded(person.skin, 0.6))


def _hair(stance: Stance, center: Point, wide: float, high: float) -> None:
    person, canvas = stance.person, stance.canvas
    x = center[0] - 0.35 * stance.sin * wide
    if stance.cos < -0.2:
        canvas.ball((x, center[1] - 0.08 * high), 1.08 * wide, 0.98 * high, person.hair)
        if person.hair_style in _FALL:
            _falling_hair(stance, -0.02, 1.1)
    else:
        canvas.ball((x, center[1] - 0.6 * high), 1.06 * wide, 0.5 * high, person.hair)
        if abs(stance.sin) > 0.35:
            back = center[0] - 0.62 * math.copysign(wide, stance.sin)
            canvas.ball((back, center[1] - 0.1 * high), 0.5 * wide, 0.82 * high, person.hair)
    if person.hair_style == "bun":
        canvas.ball((center[0] - 1.1 * stance.sin * wide, center[1] - 0.8 * high), 0.5 * wide, 0.4 * high, person.hair)


def _hat(stance: Stance, center: Point, wide: float, high: float) -> None:
    person, canvas = stance.person, stance.canvas
    x, y = center[0] - 0.05 * stance.sin * wide, center[1] - 0.35 * high
    turns = [math.pi * step / 10 for step in range(11)]
    dome = [(x + 1.12 * wide * math.cos(turn), y - 0.85 * high * math.sin(turn)) for turn in turns]
    canvas.body([*dome, (x - 1.1 * wide, y + 0.12 * high), (x + 1.1 * wide, y + 0.12 * high)], person.hat_color, x)
    if person.hat == "beanie":
        canvas.flat(box((x, y + 0.02 * high), 1.12 * wide, 0.14 * high), shaded(person.hat_color, 0.75))
    elif stance.cos > -0.3:
        brim = (center[0] + 1.05 * stance.sin * wide, y + 0.12 * high)
        canvas.ball(brim, (0.9 * abs(stance.cos) + 0.5) * wide, 0.15 * high, shaded(person.hat_color, 0.75))
