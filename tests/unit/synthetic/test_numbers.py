"""Random numbers by address."""

import numpy as np

from ecn_dist.data.draws import Draws
from ecn_dist.synthetic.numbers import Numbers, normal_field, rgb, shaded

DRAWS = Draws(0, "target", "test")


def test_numbers_go_on_beyond_what_was_drawn_first() -> None:
    numbers = Numbers(DRAWS, (1, 2, 3))
    assert [numbers.fraction() for _ in range(300)] == DRAWS.uniforms(300, (1, 2, 3))[0].tolist()


def test_normal_numbers() -> None:
    numbers = Numbers(DRAWS, (0, 0, 0))
    for found in ([numbers.normal(2.0) / 2 for _ in range(4000)], normal_field(DRAWS, (0, 0, 1), (80, 50))):
        assert abs(np.mean(found)) < 0.05
        assert abs(np.std(found) - 1) < 0.05


def test_choices_keep_their_shares() -> None:
    numbers = Numbers(DRAWS, (0, 1, 0))
    assert abs(np.mean([numbers.chance(0.3) for _ in range(4000)]) - 0.3) < 0.03
    assert all(2 <= numbers.uniform((2, 3)) < 3 for _ in range(100))


def test_colours() -> None:
    assert rgb((0.0, 1.0, 1.0)) == rgb((1.0, 2.0, 1.5)) == (255, 0, 0)
    assert shaded((200, 100, 0), 1.5) == (255, 150, 0)
