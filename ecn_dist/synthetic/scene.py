"""One picture of one person in front of one camera."""

from PIL import Image

from ecn_dist.synthetic.cameras import Camera, draw_camera, expose
from ecn_dist.synthetic.canvas import Canvas
from ecn_dist.synthetic.draws import Draws
from ecn_dist.synthetic.figure import draw_figure
from ecn_dist.synthetic.people import Person, draw_person
from ecn_dist.synthetic.places import cast_shadow, draw_background, occlude, relief
from ecn_dist.synthetic.spec import DomainSpec
from ecn_dist.synthetic.stance import Stance, draw_pose

CANVAS_HEIGHT = 256
"""Small pictures are drawn at least this tall and then reduced, which smooths their edges."""


class Studio:
    """Draws the pictures of one domain: any of them, in any order, from (seed, pid, camid, picture number) alone."""

    def __init__(self, spec: DomainSpec, *, seed: int, cameras: int, height: int, width: int) -> None:
        self.spec, self.seed = spec, seed
        self.height, self.width = height, width
        self.cameras = [
            draw_camera(spec.cameras, Draws(seed, spec.name, "camera", camid), camid, cameras)
            for camid in range(cameras)
        ]
        self.oversampling = max(2, -(-CANVAS_HEIGHT // height))

    def person(self, pid: int) -> Person:
        """The identity `pid`."""
        return draw_person(self.spec.people, Draws(self.seed, self.spec.name, "person", pid))

    def picture(self, person: Person, pid: int, camid: int, number: int) -> Image.Image:
        """Picture `number` of `person` (whose identity is `pid`) by camera `camid` (from 0), RGB, height x width."""
        draws = Draws(self.seed, self.spec.name, "picture", pid, camid, number)
        camera = self.cameras[camid]
        scene = self._scene(person, camera, draws)
        return expose(camera, scene.reduce(self.oversampling), draws, draws.uniform(self.spec.place.light))

    def _scene(self, person: Person, camera: Camera, draws: Draws) -> Image.Image:
        place = self.spec.place
        width, height = self.width * self.oversampling, self.height * self.oversampling
        unit = height * camera.scale * (1 + draws.normal(0.03))
        feet = (width * (0.5 + draws.normal(0.035)), 0.5 * (height + unit) + height * (0.01 + draws.normal(0.015)))
        light = draws.uniform((-1.0, 1.0))
        yaw = camera.main_yaw + draws.normal(self.spec.cameras.view_spread)
        if draws.chance(self.spec.cameras.any_view):
            yaw = draws.uniform((0.0, 360.0))
        background = draw_background(place, draws, width, height, height * camera.horizon)
        cast_shadow(background, feet, unit, light)
        canvas = Canvas(width, height, light)
        draw_figure(Stance(canvas, person, draw_pose(draws, yaw, feet, unit)))
        picture = canvas.composed(background, relief(draws, width, height, 7.0))
        if draws.chance(place.occlusion):
            occlude(picture, place, draws)
        return picture
