"""Cameras: where a person appears in the picture, from which side, and what the camera does to colours."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from ecn_dist.synthetic.draws import Draws
from ecn_dist.synthetic.spec import CameraSpec

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_GREY_AXIS = np.full((3, 3), 1 / 3, np.float32)
_TURN = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], np.float32) / math.sqrt(3)


@dataclass(frozen=True)
class Camera:
    """One camera of a domain: a colour matrix, gamma and haze, then blur and noise; and its view of the place."""

    matrix: np.ndarray
    """(3, 3) float32: colours are mixed by it (gains, saturation and hue)."""
    gamma: float
    haze: float
    blur: float
    noise: float
    scale: float
    main_yaw: float
    horizon: float
    """Where wall and floor meet, in units of the picture's height from the top."""
    jpeg_quality: int


def draw_camera(spec: CameraSpec, draws: Draws, camid: int, num_cameras: int) -> Camera:
    """Camera `camid` (from 0) of `num_cameras`. Casts, gammas and exposures are spread evenly over the cameras."""
    place = (camid + draws.uniform((-0.15, 0.15))) / num_cameras
    cast = draws.uniform(spec.cast)
    gains = np.array([1 + cast * math.cos(math.tau * (place - channel / 3)) for channel in range(3)], np.float32)
    # Steps of the golden ratio spread any number of cameras evenly, each property in an order of its own.
    swing = [2 * ((camid * step + offset) % 1.0) - 1 for step, offset in ((0.618034, 0.1), (0.381966, 0.6))]
    exposure = math.exp(spec.exposure * swing[1])
    matrix = (exposure * gains)[:, None] * _hue_and_saturation(
        math.radians(draws.uniform((-spec.hue, spec.hue))), draws.uniform(spec.saturation)
    )
    return Camera(
        matrix=matrix.astype(np.float32),
        gamma=math.exp(spec.gamma * swing[0]),
        haze=draws.uniform(spec.haze),
        blur=draws.uniform(spec.blur),
        noise=draws.uniform(spec.noise),
        scale=draws.uniform(spec.scale),
        main_yaw=360 * ((camid * 0.381966 + draws.uniform((0, 0.2))) % 1.0),
        horizon=draws.uniform((0.4, 0.62)),
        jpeg_quality=draws.below(spec.jpeg_quality[1] - spec.jpeg_quality[0] + 1) + spec.jpeg_quality[0],
    )


def expose(camera: Camera, picture: Image.Image, draws: Draws, light: float) -> Image.Image:
    """What the camera makes of a scene: `light` is the brightness of this moment."""
    height = picture.size[1]
    if camera.blur * height > 0.1:
        picture = picture.filter(ImageFilter.GaussianBlur(camera.blur * height))
    colors = np.asarray(picture, np.float32) / 255
    colors = np.clip(colors @ (light * camera.matrix).T, 0, 1) ** camera.gamma
    colors = (1 - camera.haze) * colors + 0.6 * camera.haze
    colors += _noise(camera.noise, draws, colors.shape)
    return Image.fromarray((np.clip(colors, 0, 1) * 255 + 0.5).astype(np.uint8))


def _noise(strength: float, draws: Draws, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of the sensor: mostly common to the three channels."""
    grey = draws.generator.standard_normal(shape[:2], dtype=np.float32)[:, :, None]
    return strength * (0.8 * grey + 0.5 * draws.generator.standard_normal(shape, dtype=np.float32))


def _hue_and_saturation(angle: float, saturation: float) -> np.ndarray:
    """The (3, 3) matrix that turns colours about the grey axis and draws them to or from their luminance."""
    turn = math.cos(angle) * np.eye(3, dtype=np.float32) + (1 - math.cos(angle)) * _GREY_AXIS + math.sin(angle) * _TURN
    return (saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * _LUMA[None, :]) @ turn
