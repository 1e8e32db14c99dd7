"""Patterns of cloth, drawn flat over a canvas and seen through the shape of a garment."""

from PIL import Image, ImageDraw

from ecn_dist.synthetic.canvas import Paint
from ecn_dist.synthetic.people import Garment


def cloth(garment: Garment, size: tuple[int, int], origin: tuple[float, float], unit: float, squeeze: float) -> Paint:
    """The paint of a garment on a canvas of `size`.

    `origin` is a point of the cloth in pixels (the pattern hangs from it, so that it moves with the wearer), `unit` the
    wearer's height in pixels, and `squeeze` (0..1] how much a turned body narrows what lies across it.
    """
    period = garment.period * unit
    if garment.pattern in ("plain", "logo") or period < 2:
        return garment.color
    picture = Image.new("RGB", size, garment.color)
    draw = ImageDraw.Draw(picture)
    width, height = size
    x0, y0 = origin
    across = max(2.0, period * squeeze)
    columns = range(-int(x0 / across) - 1, int((width - x0) / across) + 2)
    rows = range(-int(y0 / period) - 1, int((height - y0) / period) + 2)
    if garment.pattern in ("stripes", "checks"):
        for row in rows:
            y = y0 + row * period
            draw.rectangle((0, y, width, y + 0.45 * period), fill=garment.second)
    if garment.pattern in ("bars", "checks"):
        mixed = Image.blend(Image.new("RGB", (1, 1), garment.color), Image.new("RGB", (1, 1), garment.second), 0.5)
        color = garment.second if garment.pattern == "bars" else mixed.getpixel((0, 0))
        for column in columns:
            x = x0 + column * across
            draw.rectangle((x, 0, x + 0.4 * across, height), fill=color)
    if garment.pattern == "dots":
        radius_x, radius_y = 0.3 * across, 0.3 * period
        for row in rows:
            for column in columns:
                x, y = x0 + (column + 0.5 * (row % 2)) * across, y0 + row * period
                draw.ellipse((x - radius_x, y - radius_y, x + radius_x, y + radius_y), fill=garment.second)
    if garment.pattern == "blocks":
        draw.rectangle((0, y0 + (0.06 + garment.period) * unit, width, height), fill=garment.second)
    return picture
