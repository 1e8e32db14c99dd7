"""One picture of one person in front of one camera."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ecn_dist.data.draws import Draws
from ecn_dist.synthetic.camera import Camera, draw_camera, expose
from ecn_dist.synthetic.numbers import Numbers, normal_field, shaded
from ecn_dist.synthetic.person import Figure, Person, draw_person
from ecn_dist.synthetic.spec import DomainSpec, PlaceSpec

CANVAS_HEIGHT = 256  # small pictures are drawn at least this tall and then reduced, which smooths their edges
RELIEF = 7 / 128  # strength of the broad random light and shade over a picture


class Studio:
    """Draws the pictures of one domain: any of them, in any order, from (seed, pid, camid, picture number) alone."""

    def __init__(self, spec: DomainSpec, *, seed: int, cameras: int, height: int, width: int) -> None:
        self.spec, self.height, self.width = spec, height, width
        self._people, self._pictures, self._noise, self._relief, shared = (
            Draws(seed, spec.name, purpose) for purpose in ("people", "pictures", "noise", "relief", "cameras")
        )
        self.cameras = [
            draw_camera(spec.cameras, Numbers(shared, (0, 0, 0)), camid, cameras) for camid in range(cameras)
        ]
        self.oversampling = max(2, -(-CANVAS_HEIGHT // height))

    def person(self, pid: int) -> Person:
        """The identity `pid`."""
        return draw_person(self.spec.people, Numbers(self._people, (pid, 0, 0)))

    def picture(self, person: Person, pid: int, camid: int, number: int) -> Image.Image:
        """Picture `number` of `person` (whose identity is `pid`) by camera `camid` (from 0), RGB, height x width."""
        address = (pid, camid, number)
        numbers, camera = Numbers(self._pictures, address), self.cameras[camid]
        scene = self._scene(person, camera, numbers).reduce(self.oversampling)
        coarse_64 = 1 + RELIEF * normal_field(self._relief, address, (12, 6))
        relief_HW = np.asarray(Image.fromarray(coarse_64).resize(scene.size, Image.Resampling.BICUBIC))
        lit = Image.fromarray(np.clip(np.asarray(scene) * relief_HW[..., None], 0, 255).astype(np.uint8))
        noise_HW4 = normal_field(self._noise, address, (self.height, self.width, 4))
        return expose(camera, lit, numbers.uniform(self.spec.place.light), noise_HW4)

    def _scene(self, person: Person, camera: Camera, numbers: Numbers) -> Image.Image:
        place, view = self.spec.place, self.spec.cameras
        width, height = self.width * self.oversampling, self.height * self.oversampling
        unit = height * view.scale * (1 + numbers.normal(0.04))
        feet = (width * (0.5 + numbers.normal(0.035)), 0.5 * (height + unit) + height * (0.01 + numbers.normal(0.015)))
        yaw = numbers.uniform((0, 360)) if numbers.chance(view.any_view) else camera.yaw + numbers.normal(view.yaw)
        picture = draw_background(place, numbers, width, height, camera.horizon)
        phase, stride = numbers.uniform((0, math.tau)), numbers.uniform((0.1, 1.0))
        Figure(picture, person, yaw, phase, stride, feet, unit).draw()
        if numbers.chance(place.occlusion):
            side, top = numbers.uniform((0.2, 0.34)) * width, numbers.uniform((0.3, 0.6)) * height
            left = 0.0 if numbers.chance(0.5) else width - side
            tone = shaded(numbers.color(place.walls, 0.15), 0.8)
            ImageDraw.Draw(picture).rectangle((left, top, left + side, height), fill=tone)
        return picture


def draw_background(spec: PlaceSpec, numbers: Numbers, width: int, height: int, horizon: float) -> Image.Image:
    """A wall of panels above and a floor below `horizon`, with things before them, softly out of focus."""
    wall, floor = numbers.color(spec.walls, 0.05), numbers.color(spec.floors, 0.04)
    picture = Image.new("RGB", (width, height), floor)
    draw = ImageDraw.Draw(picture)
    panel, x, edge = numbers.uniform((0.35, 0.6)) * width, -numbers.uniform((0.0, 0.5)) * width, horizon * height
    while x < width:
        draw.rectangle((x, 0, x + panel, edge), fill=shaded(wall, numbers.uniform((0.9, 1.1))))
        x += panel
    for _ in range(2 * round(spec.clutter)):
        x, foot = numbers.uniform((-0.05, 1.05)) * width, edge + numbers.uniform((0.1, 0.4)) * (height - edge)
        half, tall = numbers.uniform((0.04, 0.2)) * width, numbers.uniform((0.1, 0.7)) * height
        tone = shaded(numbers.color(spec.floors + spec.walls, 0.15), 0.75)
        if numbers.chance(0.5):
            draw.rectangle((x - half, foot - tall, x + half, foot), fill=tone)
    return picture.filter(ImageFilter.BoxBlur(0.008 * height))
