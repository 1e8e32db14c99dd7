"""Backgrounds and foregrounds: a wall and a floor from a domain's family, things on them, and what hides a person."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ecn_dist.synthetic.draws import Draws, shaded
from ecn_dist.synthetic.spec import PlaceSpec


def draw_background(spec: PlaceSpec, draws: Draws, width: int, height: int, horizon: float) -> Image.Image:
    """A wall above and a floor below `horizon` (in pixels), softly out of focus.

    It is drawn at half of `width` x `height` and enlarged: what is behind the person is not sharp.
    """
    half_width, half_height, edge = width // 2, height // 2, horizon / 2
    wall, floor = draws.color(spec.walls, 0.05), draws.color(spec.floors, 0.04)
    picture = Image.new("RGB", (half_width, half_height), floor)
    draw = ImageDraw.Draw(picture)
    _floor_lines(draw, draws, shaded(floor, 0.9), half_width, half_height, edge)
    draw.rectangle((0, 0, half_width, edge), fill=wall)
    _WALLS[spec.style](draw, draws, wall, half_width, edge)
    draw.rectangle((0, edge - 0.015 * half_height, half_width, edge), fill=shaded(floor, 0.7))
    for _ in range(int(draws.generator.poisson(spec.clutter))):
        _thing(draw, draws, spec, half_width, half_height, edge)
    picture = picture.filter(ImageFilter.BoxBlur(0.008 * half_height))
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def cast_shadow(picture: Image.Image, feet: tuple[float, float], unit: float, light: float) -> None:
    """Darken the floor of `picture` beside `feet`, away from the light (-1 left, 1 right)."""
    reach, depth, soft = (0.15 + 0.06 * abs(light)) * unit, 0.022 * unit, 0.022 * unit
    shadow = Image.new("L", (round(2 * (reach + 2 * soft)), round(2 * (depth + 2 * soft))))
    width, height = shadow.size
    ImageDraw.Draw(shadow).ellipse((2 * soft, 2 * soft, width - 2 * soft, height - 2 * soft), fill=120)
    corner = (round(feet[0] - 0.1 * light * unit - width / 2), round(feet[1] - height / 2))
    picture.paste((12, 12, 18), corner, shadow.filter(ImageFilter.BoxBlur(soft)))


def relief(draws: Draws, width: int, height: int, strength: float) -> Image.Image:
    """Broad random light and shade around 128 (mode L), for folds of cloth and patches of light."""
    coarse = 128 + strength * draws.generator.standard_normal((12, 6))
    grid = Image.fromarray(np.clip(coarse, 64, 192).astype(np.uint8))
    return grid.resize((width, height), Image.Resampling.BICUBIC)


def occlude(picture: Image.Image, spec: PlaceSpec, draws: Draws) -> None:
    """Draw something in front of the person: a post, a hedge, a barrier or a sign."""
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    kind = draws.below(4)
    if kind == 0:
        x, thick = draws.uniform((0.05, 0.95)) * width, draws.uniform((0.06, 0.14)) * width
        color = shaded(draws.color(spec.floors, 0.08), 0.7)
        draw.rectangle((x - thick, 0, x + thick, height), fill=color)
        draw.rectangle((x - thick, 0, x - 0.3 * thick, height), fill=shaded(color, 1.25))
    elif kind == 1:
        top = draws.uniform((0.66, 0.85)) * height
        green = draws.color(((0.28, 0.5, 0.35),), 0.05)
        for _ in range(26):
            x, y, r = draws.uniform((0, 1)) * width, top + abs(draws.normal(0.08)) * height, 0.05 * height
            draw.ellipse((x - r, y - r, x + r, y + r), fill=shaded(green, draws.uniform((0.75, 1.25))))
        draw.rectangle((0, top + 0.1 * height, width, height), fill=shaded(green, 0.8))
    elif kind == 2:
        top, color = (
            draws.uniform((0.6, 0.75)) * height,
            draws.color(((0.02, 0.7, 0.75), (0.13, 0.7, 0.85), (0.6, 0.1, 0.8)), 0.05),
        )
        for level in (0.0, 0.1):
            y = top + level * height
            draw.rectangle((0, y, width, y + 0.045 * height), fill=color)
            draw.rectangle((0, y + 0.03 * height, width, y + 0.045 * height), fill=shaded(color, 0.7))
    else:
        left, side = draws.chance(0.5), draws.uniform((0.2, 0.34)) * width
        top = draws.uniform((0.3, 0.6)) * height
        box = (0.0, top, side, height) if left else (width - side, top, width, height)
        color = draws.color(spec.walls, 0.15)
        draw.rectangle(box, fill=shaded(color, 0.8), outline=shaded(color, 0.55), width=max(1, height // 100))


Wall = Callable[[ImageDraw.ImageDraw, Draws, tuple[int, int, int], int, float], None]


def _panels(draw: ImageDraw.ImageDraw, draws: Draws, color: tuple[int, int, int], width: int, edge: float) -> None:
    panel, x = draws.uniform((0.35, 0.6)) * width, -draws.uniform((0.0, 0.5)) * width
    while x < width:
        draw.rectangle((x, 0, x + panel, edge), fill=shaded(color, draws.uniform((0.92, 1.08))))
        draw.line((x, 0, x, edge), fill=shaded(color, 0.75))
        x += panel


def _bricks(draw: ImageDraw.ImageDraw, draws: Draws, color: tuple[int, int, int], width: int, edge: float) -> None:
    course = 0.09 * width
    row, y = draws.below(2), edge
    while y > 0:
        x = -(0.25 + 0.5 * (row % 2)) * 2.4 * course
        while x < width:
            tone = shaded(color, draws.uniform((0.85, 1.12)))
            draw.rectangle((x, y - course, x + 2.4 * course - 1, y - 1), fill=tone)
            x += 2.4 * course
        row, y = row + 1, y - course


def _windows(draw: ImageDraw.ImageDraw, draws: Draws, color: tuple[int, int, int], width: int, edge: float) -> None:
    step, x = 0.5 * width, -draws.uniform((0.0, 0.5)) * width
    glass = shaded(color, 0.55)
    while x < width:
        for top in (0.08, 0.5):
            draw.rectangle(
                (x, top * edge, x + 0.32 * width, (top + 0.3) * edge), fill=glass, outline=shaded(color, 1.2)
            )
        x += step


_WALLS: dict[str, Wall] = {"panels": _panels, "bricks": _bricks, "windows": _windows}


def _floor_lines(
    draw: ImageDraw.ImageDraw, draws: Draws, color: tuple[int, int, int], width: int, height: int, edge: float
) -> None:
    vanishing = (draws.uniform((-0.5, 1.5)) * width, edge - 0.6 * (height - edge))
    for column in range(-6, 8):
        draw.line((vanishing, (column * 0.45 * width, height * 1.2)), fill=color)
    wall_above = draws.uniform((0.03, 0.06)) * height
    y = edge + wall_above
    while y < height:
        draw.line((0, y, width, y), fill=color)
        wall_above *= 1.5
        y += wall_above


def _thing(draw: ImageDraw.ImageDraw, draws: Draws, spec: PlaceSpec, width: int, height: int, edge: float) -> None:
    """A post, a plant, a box or a passer-by, somewhat farther off than the person."""
    x, foot = draws.uniform((-0.05, 1.05)) * width, edge + draws.uniform((0.1, 0.4)) * (height - edge)
    kind = draws.below(4)
    tone = draws.color(spec.floors + spec.walls, 0.15)
    if kind == 0:
        thick = 0.04 * width
        draw.rectangle((x - thick, 0, x + thick, foot), fill=shaded(tone, 0.7))
    elif kind == 1:
        green = draws.color(((0.3, 0.5, 0.4),), 0.06)
        for _ in range(8):
            cx, cy, r = x + draws.normal(0.08) * width, foot - 0.12 * height + draws.normal(0.05) * height, 0.08 * width
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=shaded(green, draws.uniform((0.7, 1.3))))
        draw.rectangle((x - 0.08 * width, foot - 0.08 * height, x + 0.08 * width, foot), fill=shaded(tone, 0.6))
    elif kind == 2:
        side = draws.uniform((0.12, 0.22)) * width
        draw.rectangle((x - side, foot - draws.uniform((0.1, 0.2)) * height, x + side, foot), fill=shaded(tone, 0.8))
    else:
        unit = draws.uniform((0.45, 0.6)) * height
        dark = draws.uniform((0.4, 0.9))
        for side in (-1, 1):
            draw.line(
                (x, foot - 0.5 * unit, x + 0.05 * side * unit, foot),
                fill=shaded(tone, 0.5 * dark),
                width=max(1, int(0.06 * unit)),
            )
        draw.ellipse(
            (x - 0.12 * unit, foot - 0.86 * unit, x + 0.12 * unit, foot - 0.42 * unit), fill=shaded(tone, dark)
        )
        draw.ellipse((x - 0.05 * unit, foot - unit, x + 0.05 * unit, foot - 0.86 * unit), fill=(170, 130, 105))
