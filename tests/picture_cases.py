"""What the tests of pictures share: small ranking problems, and pictures that can be told apart by colour."""

import io

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ecn_dist.ranking import FeatureSet, evaluate_ranking
from ecn_dist.ranking.evaluating import Evaluation
from ecn_dist.reporting.montage import png_of


def random_case(seed: int, queries: int = 7, gallery: int = 40) -> tuple[torch.Tensor, ...]:
    """Small integer features, so that equal distances are common and exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *size: int) -> torch.Tensor:
        return torch.randint(0, high, size, generator=generator)

    return (
        draw(3, queries, 4).float(),
        draw(6, queries),
        draw(3, queries),
        draw(3, gallery, 4).float(),
        draw(5, gallery),  # pid 5 is in no gallery
        draw(3, gallery),
    )


def evaluation_of(
    case: tuple[torch.Tensor, ...], *, camera_free: bool = False, part: slice = slice(None)
) -> Evaluation:
    """As `evaluate_backbone` gives it; with `part`, this rank's part of the gallery."""
    query, gallery = FeatureSet(*case[:3]), FeatureSet(*case[3:])
    labels = (query.features, query.pids, query.camids, gallery.features, gallery.pids, gallery.camids)
    result = evaluate_ranking(
        *(None if camera_free and place in (2, 5) else values for place, values in enumerate(labels)),  # type: ignore[arg-type]
        camera_pairs=not camera_free,
    )
    own = FeatureSet(gallery.features[part], gallery.pids[part], gallery.camids[part])
    return Evaluation(result, query, own, camera_free)


def pixels_of(figure: Figure) -> np.ndarray:
    """The drawn figure (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(png_of(figure))).convert("RGB"))


def color_of(row: int) -> tuple[int, int, int]:
    """A colour of its own for each of many rows, none of them near paper, ink or a frame."""
    return (40 + 37 * row % 180, 60 + 53 * row % 120, 230 - 29 * row % 90)


def plain_picture(row: int) -> Image.Image:
    """A picture of one colour: `color_of(row)`."""
    return Image.new("RGB", (32, 64), color_of(row))
