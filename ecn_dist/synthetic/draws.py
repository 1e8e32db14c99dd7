"""Random draws that depend on nothing but their names: any picture can be drawn at any time, by any process."""

import colorsys
import zlib

import numpy as np

from ecn_dist.synthetic.spec import Color, Range, Weights

RGB = tuple[int, int, int]


class Draws:
    """A stream of random numbers named by integers and words, as in `Draws(seed, "target", "person", pid)`."""

    def __init__(self, *names: int | str) -> None:
        key = [name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names]
        self.generator = np.random.default_rng(key)

    def uniform(self, bounds: Range) -> float:
        return float(bounds[0] + (bounds[1] - bounds[0]) * self.generator.random())

    def normal(self, spread: float) -> float:
        return float(spread * self.generator.standard_normal())

    def chance(self, probability: float) -> bool:
        return bool(self.generator.random() < probability)

    def below(self, bound: int) -> int:
        return int(self.generator.integers(bound))

    def choice(self, weights: Weights) -> str:
        point = self.generator.random() * sum(share for _, share in weights)
        for name, share in weights:
            point -= share
            if point < 0:
                return name
        return weights[-1][0]

    def color(self, colors: tuple[Color, ...], spread: float) -> RGB:
        """One of `colors`, varied by `spread` in saturation and value and by a third of it in hue."""
        hue, saturation, value = colors[self.below(len(colors))]
        return rgb((hue + self.normal(spread / 3), saturation + self.normal(spread), value + self.normal(spread)))


def rgb(color: Color) -> RGB:
    """Hue (a circle of length 1), saturation and value (cut to 0..1) as 8-bit red, green and blue."""
    hue, saturation, value = color
    channels = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    red, green, blue = (round(255 * channel) for channel in channels)
    return red, green, blue


def shaded(color: RGB, factor: float) -> RGB:
    """`color` times `factor`, cut to 0..255."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in color)
    return red, green, blue
