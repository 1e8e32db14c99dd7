"""Style copies without a network: match each camera's histogram to each other camera's.

A camera changes colours mostly by its gains, gamma and white balance, which act on each channel alone. The monotone
curve that takes the distribution of a channel's values at one camera to that at another undoes and redoes them. It is
one curve for a pair of cameras, measured over all their training pictures, so a picture keeps what is its own.

C cameras, K = 3 channels, V = 256 values.
"""

from collections.abc import Iterable

import numpy as np
from PIL import Image

CHANNELS = 3
VALUES = 256


def picture_histogram(image: Image.Image) -> np.ndarray:
    """(K, V) int64 counts of an RGB picture's values."""
    return np.asarray(image.histogram(), dtype=np.int64).reshape(CHANNELS, VALUES)


def style_tables(histograms_CKV: np.ndarray) -> np.ndarray:
    """(C, C, K, V) uint8: entry [c, d] takes values of camera c to the style of camera d. [c, c] changes nothing.

    Value v of camera c, at quantile q of that camera's values, becomes the value at quantile q of camera d, linearly
    interpolated. The quantile of a value is that of the middle of its pixels, so that a camera matched to itself gives
    the identity. Never decreasing in v.
    """
    num_cameras = len(histograms_CKV)
    tables_CCKV = np.empty((num_cameras, num_cameras, CHANNELS, VALUES), dtype=np.uint8)
    quantiles_CKV = (histograms_CKV.cumsum(-1) - histograms_CKV / 2) / histograms_CKV.sum(-1, keepdims=True)
    for d in range(num_cameras):
        for k in range(CHANNELS):
            (values,) = histograms_CKV[d, k].nonzero()
            matched_CV = np.interp(quantiles_CKV[:, k], quantiles_CKV[d, k, values], values)
            tables_CCKV[:, d, k] = matched_CV.round().astype(np.uint8)
    tables_CCKV[range(num_cameras), range(num_cameras)] = np.arange(VALUES, dtype=np.uint8)
    return tables_CCKV


def in_styles(image: Image.Image, tables_CKV: np.ndarray, camids: Iterable[int]) -> dict[int, Image.Image]:
    """An RGB picture in the style of each of `camids`; `tables_CKV` is `style_tables(...)[c]` for the camera c."""
    return {camid: image.point(tables_CKV[camid].ravel().tolist()) for camid in camids}
