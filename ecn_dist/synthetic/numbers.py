"""Random numbers one after another, which depend on nothing but where they are for: any picture can be drawn at any
time, by any process, and with any version of NumPy."""

import colorsys

import numpy as np

from ecn_dist.data.draws import Address, Draws
from ecn_dist.synthetic.spec import Color, Range

RGB = tuple[int, int, int]


class Numbers:
    """The numbers of one address of `draws`, in the order in which they are asked for."""

    def __init__(self, draws: Draws, address: Address) -> None:
        self._draws, self._address = draws, address
        self._drawn, self._used = draws.uniforms(64, address)[0], 0

    def fraction(self) -> float:
        """Uniform in [0, 1)."""
        if self._used == len(self._drawn):
            self._drawn = self._draws.uniforms(2 * self._used, self._address)[0]
        self._used += 1
        return float(self._drawn[self._used - 1])

    def uniform(self, bounds: Range) -> float:
        return bounds[0] + (bounds[1] - bounds[0]) * self.fraction()

    def normal(self, spread: float) -> float:
        """Of standard deviation `spread`, nearly normal, and never beyond 3.5 times that."""
        return spread * (sum(self.fraction() for _ in range(4)) - 2) * 3**0.5

    def chance(self, probability: float) -> bool:
        return self.fraction() < probability

    def color(self, colors: tuple[Color, ...], spread: float) -> RGB:
        """One of `colors`, varied by `spread` in saturation and value and by a third of it in hue."""
        hue, saturation, value = colors[int(self.fraction() * len(colors))]
        return rgb((hue + self.normal(spread / 3), saturation + self.normal(spread), value + self.normal(spread)))


def normal_field(draws: Draws, address: Address, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of `shape`: nearly normal numbers of mean 0 and variance 1."""
    uniforms = draws.uniforms(3 * int(np.prod(shape)), address).reshape(*shape, 3)
    return (2 * uniforms.sum(-1) - 3).astype(np.float32)


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
