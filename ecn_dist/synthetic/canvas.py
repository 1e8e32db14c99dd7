"""A canvas of three layers: colour, shading and where the figure is. Positions are in pixels, y downwards."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ecn_dist.synthetic.draws import RGB

Point = tuple[float, float]
Paint = RGB | Image.Image
"""A colour, or a picture of the canvas's size that shows through the shape."""

NEUTRAL = 128
"""The shade that leaves a colour as it is; 64 halves it."""


class Canvas:
    """Colours and shades of solid shapes. A rounded shape is drawn dark in the shade layer, with a narrower, lighter
    one inside it that lies towards the light; a blur of that layer then makes it look round."""

    def __init__(self, width: int, height: int, light: float) -> None:
        self.size = width, height
        self.light = light
        """Where the light comes from: -1 left, 1 right."""
        self.color = Image.new("RGB", self.size)
        self.shade = Image.new("L", self.size, NEUTRAL)
        self.mask = Image.new("L", self.size)
        self._on_color, self._on_shade = ImageDraw.Draw(self.color), ImageDraw.Draw(self.shade)
        self._on_mask = ImageDraw.Draw(self.mask)

    def limb(self, joints: Sequence[Point], radii: Sequence[float], paint: Paint) -> None:
        """A rounded bar through `joints`, tapered between their `radii`."""
        bones = list(zip(joints, joints[1:], radii, radii[1:], strict=False))
        for start, end, radius, end_radius in bones:
            self._solid(_capsule(start, end, radius, end_radius), paint, 100)
        shift = 0.3 * self.light
        for start, end, radius, end_radius in bones:
            start, end = (start[0] + shift * radius, start[1]), (end[0] + shift * end_radius, end[1])
            self._on_shade.polygon(_capsule(start, end, 0.6 * radius, 0.6 * end_radius), fill=138)

    def body(self, outline: Sequence[Point], paint: Paint, center: float) -> None:
        """A rounded closed shape; `center` is the x that its lit part is drawn towards."""
        self._solid(outline, paint, 104)
        middle = center + 0.3 * self.light * max(abs(x - center) for x, _ in outline)
        self._on_shade.polygon([(middle + 0.66 * (x - center), y) for x, y in outline], fill=138)

    def ball(self, center: Point, radius_x: float, radius_y: float, paint: Paint) -> None:
        """An ellipsoid."""
        self._solid(_ellipse(center, radius_x, radius_y), paint, 108)
        lit = (center[0] + 0.25 * self.light * radius_x, center[1] - 0.1 * radius_y)
        self._on_shade.polygon(_ellipse(lit, 0.65 * radius_x, 0.7 * radius_y), fill=136)

    def flat(self, outline: Sequence[Point], paint: Paint) -> None:
        """A shape that takes the shade of what it lies on."""
        self._paint(outline, paint)

    def flat_ball(self, center: Point, radius_x: float, radius_y: float, color: RGB) -> None:
        """A round patch that takes the shade of what it lies on."""
        self._paint(_ellipse(center, radius_x, radius_y), color)

    def strap(self, start: Point, end: Point, width: float, color: RGB) -> None:
        self._on_color.line([start, end], fill=color, width=max(1, round(width)))

    def composed(self, background: Image.Image, relief: Image.Image) -> Image.Image:
        """The shaded figure over `background`. `relief` (mode L, around NEUTRAL) is folded into the shade."""
        shade = self.shade.filter(ImageFilter.BoxBlur(max(1.0, self.size[1] / 170)))
        shades = np.asarray(shade, np.uint16) + np.asarray(relief, np.uint16) - NEUTRAL
        lit = np.asarray(self.color, np.uint16) * shades[:, :, None] // NEUTRAL
        figure = Image.fromarray(np.minimum(lit, 255).astype(np.uint8))
        background.paste(figure, mask=self.mask)
        return background

    def _solid(self, outline: Sequence[Point], paint: Paint, shade: int) -> None:
        self._paint(outline, paint)
        self._on_shade.polygon(outline, fill=shade)
        self._on_mask.polygon(outline, fill=255)

    def _paint(self, outline: Sequence[Point], paint: Paint) -> None:
        if not isinstance(paint, Image.Image):
            self._on_color.polygon(outline, fill=paint)
            return
        left, top = (max(0, math.floor(min(point[axis] for point in outline))) for axis in (0, 1))
        right, bottom = (min(self.size[axis], math.ceil(max(point[axis] for point in outline)) + 1) for axis in (0, 1))
        if left >= right or top >= bottom:
            return
        stencil = Image.new("1", (right - left, bottom - top))
        ImageDraw.Draw(stencil).polygon([(x - left, y - top) for x, y in outline], fill=1)
        self.color.paste(paint.crop((left, top, right, bottom)), (left, top), stencil)


_CIRCLE = [(math.cos(math.tau * step / 20), math.sin(math.tau * step / 20)) for step in range(20)]


def _ellipse(center: Point, radius_x: float, radius_y: float) -> list[Point]:
    return [(center[0] + radius_x * x, center[1] + radius_y * y) for x, y in _CIRCLE]


def box(center: Point, half_x: float, half_y: float) -> list[Point]:
    """The outline of an upright rectangle."""
    (x, y), corners = center, ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return [(x + i * half_x, y + j * half_y) for i, j in corners]


def _capsule(start: Point, end: Point, radius: float, end_radius: float) -> list[Point]:
    """The outline of a bar with round ends, as half a polygonal circle at each end."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    outline = []
    for step in range(14):
        turn = angle + math.pi / 2 + math.pi * (step if step < 7 else step - 1) / 6
        (x, y), r = (start, radius) if step < 7 else (end, end_radius)
        outline.append((x + r * math.cos(turn), y + r * math.sin(turn)))
    return outline
