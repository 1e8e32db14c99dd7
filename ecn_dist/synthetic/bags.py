"""Bags: a backpack, a bag on a strap across the body, a handbag."""

import math

from ecn_dist.synthetic.canvas import Point, box
from ecn_dist.synthetic.draws import shaded
from ecn_dist.synthetic.stance import HIP, SHOULDER, Stance

HAND = -1
"""The side whose hand carries a handbag: the right."""


def draw_behind(stance: Stance) -> None:
    """What a body that is seen from the front hides in part."""
    if stance.person.bag == "backpack" and stance.cos > 0:
        _backpack(stance)


def draw_before(stance: Stance) -> None:
    """What lies on the torso."""
    if stance.person.bag == "backpack" and stance.cos > 0:
        _straps(stance)
    elif stance.person.bag == "backpack":
        _backpack(stance)
    elif stance.person.bag == "shoulder":
        _shoulder_bag(stance)


def draw_in_hand(stance: Stance, hand: Point) -> None:
    """A handbag that hangs from `hand` (in pixels)."""
    if stance.person.bag != "handbag":
        return
    canvas, unit, size, color = stance.canvas, stance.unit, stance.person.bag_size, stance.person.bag_color
    half = math.hypot(0.035 * stance.cos, 0.075 * stance.sin) * size * unit
    x, top, bottom = hand[0], hand[1] + 0.06 * unit, hand[1] + (0.06 + 0.1 * size) * unit
    for side in (-1, 1):
        canvas.strap(hand, (x + 0.6 * side * half, top), 0.01 * unit, shaded(color, 0.7))
    canvas.body([(x - 0.8 * half, top), (x + 0.8 * half, top), (x + half, bottom), (x - half, bottom)], color, x)


def _backpack(stance: Stance) -> None:
    unit, size, color = stance.unit, stance.person.bag_size, stance.person.bag_color
    x, y = stance.project((0.0, SHOULDER - 0.005 - 0.12 * size, -0.1))
    half = math.hypot(0.085 * size * stance.cos, 0.06 * size * stance.sin) * unit
    high, corner = 0.12 * size * unit, 0.3 * half
    right = [(x + half - corner, y - high), (x + half, y - high + corner), (x + half, y + high)]
    left = [(x - half, y + high), (x - half, y - high + corner), (x - half + corner, y - high)]
    stance.canvas.body(right + left, color, x)
    stance.canvas.flat(box((x, y + 0.5 * high), 0.7 * half, 0.3 * high), shaded(color, 0.75))


def _straps(stance: Stance) -> None:
    for side in (-1, 1):
        across = side * stance.person.width
        top, bottom = (0.065 * across, SHOULDER + 0.02, 0.05), (0.085 * across, SHOULDER - 0.16, 0.05)
        stance.canvas.strap(stance.project(top), stance.project(bottom), 0.022 * stance.unit, stance.person.bag_color)


def _shoulder_bag(stance: Stance) -> None:
    """At the left hip, on a strap over the right shoulder, seen from the front and from behind."""
    canvas, unit, person = stance.canvas, stance.unit, stance.person
    near = math.copysign(0.06, stance.cos)
    x, y = stance.project((0.12 * person.width, HIP + 0.06, near))
    top = stance.project((-0.07 * person.width, SHOULDER + 0.025, 0.5 * near))
    canvas.strap(top, (x, y), 0.018 * unit, person.bag_color)
    half = math.hypot(0.05 * stance.cos, 0.07 * stance.sin) * person.bag_size * unit
    canvas.body(box((x, y + 0.045 * unit), half, 0.055 * person.bag_size * unit), person.bag_color, x)
    canvas.flat(box((x, y + 0.02 * unit), half, 0.025 * person.bag_size * unit), shaded(person.bag_color, 0.8))
