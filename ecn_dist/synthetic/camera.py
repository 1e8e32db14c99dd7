"""Cameras: from which side one sees people, and what it does to colours."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from ecn_dist.synthetic.numbers import Numbers
from ecn_dist.synthetic.spec import CameraSpec, Range

_LUMA = np.array([0.299, 0.587, 0.114])  # saturation draws colours to or from it
_TURN = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # about the grey axis


@dataclass(frozen=True)
class Camera:
    """One camera of a domain: blur, a colour matrix, gamma, haze and noise; and its view of people."""

    matrix: np.ndarray  # (3, 3): colours are mixed by it (gains, saturation and hue)
    gamma: float
    haze: float
    blur: float
    noise: float
    yaw: float  # the direction in which most people walk, in degrees: 0 towards the camera
    horizon: float  # where wall and floor meet, in units of the picture's height from the top
    jpeg_quality: int


def draw_camera(spec: CameraSpec, numbers: Numbers, camid: int, num_cameras: int) -> Camera:
    """Camera `camid` (from 0) of `num_cameras`, of whom `numbers` are the same for all.

    Every property is spread evenly over the cameras, however many there are, in an order of its own: by multiples of
    an irrational number (the root of a prime) from a point that is drawn.
    """
    primes = iter((2, 3, 5, 7, 11, 13, 17, 19, 23))

    def spread(bounds: Range) -> float:
        place = (numbers.fraction() + camid * math.sqrt(next(primes))) % 1.0
        return bounds[0] + (bounds[1] - bounds[0]) * place

    gamma, exposure = (math.exp(spread((-most, most))) for most in (spec.gamma, spec.exposure))
    hue = math.radians(spread((-spec.hue, spec.hue)))
    haze, blur, noise = spread(spec.haze), spread(spec.blur), spread(spec.noise)
    cast, saturation, yaw = spread(spec.cast), spread(spec.saturation), spread((0, 360))
    direction = numbers.fraction() / num_cameras + camid / num_cameras
    gains = np.array([1 + cast * math.cos(math.tau * (direction - channel / 3)) for channel in range(3)])
    turn = math.cos(hue) * np.eye(3) + (1 - math.cos(hue)) * np.full((3, 3), 1 / 3) + math.sin(hue) * _TURN
    mix = saturation * np.eye(3) + (1 - saturation) * _LUMA[None, :]
    matrix = exposure * gains[:, None] * (mix @ turn)
    horizon, jpeg_quality = numbers.uniform((0.4, 0.62)), round(numbers.uniform(spec.jpeg_quality))
    return Camera(matrix, gamma, haze, blur, noise, yaw, horizon, jpeg_quality)


def expose(camera: Camera, scene: Image.Image, light: float, noise_HW4: np.ndarray) -> Image.Image:
    """What the camera makes of a scene: `light` is the brightness of this moment, `noise_HW4` of mean 0, variance 1."""
    blurred = scene.filter(ImageFilter.GaussianBlur(camera.blur * scene.height))
    colors_HW3 = np.asarray(blurred, np.float32) / 255
    colors_HW3 = np.clip(colors_HW3 @ (light * camera.matrix).T, 0, 1) ** camera.gamma
    colors_HW3 = (1 - camera.haze) * colors_HW3 + 0.6 * camera.haze
    # A sensor's noise is mostly common to the three channels.
    colors_HW3 = colors_HW3 + camera.noise * (0.8 * noise_HW4[:, :, 3:] + 0.5 * noise_HW4[:, :, :3])
    return Image.fromarray((np.clip(colors_HW3, 0, 1) * 255 + 0.5).astype(np.uint8))
