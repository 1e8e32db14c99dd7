"""From a feature map to a feature: generalised-mean pooling, and the neck after it.

Shape letters: b images here, C channels, h x w positions.
"""

import torch
from torch import Tensor, nn

FLOOR = 1e-6


class GeM(nn.Module):
    """Generalised-mean pooling (Radenovic et al. 2019): (mean of x^p)^(1/p) over the positions, with one trained p.

    Values are at least 1e-6. In float32 under autocast, and relative to the largest value, so that no power leaves the
    range of the numbers.
    """

    def __init__(self, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, map_bChw: Tensor) -> Tensor:
        """(b, C, h, w) -> (b, C, 1, 1) in its dtype."""
        # The meta device, on which costs are counted, knows no autocast.
        with torch.autocast("cpu" if map_bChw.is_meta else map_bChw.device.type, enabled=False):
            values = map_bChw.to(self.p.dtype).clamp(min=FLOOR)
            largest = values.detach().amax((2, 3), keepdim=True)  # cancels out, in the gradient too
            means = (values / largest).pow(self.p).mean((2, 3), keepdim=True)
            return (largest * means.pow(1 / self.p)).to(map_bChw.dtype)


class Neck(nn.BatchNorm1d):
    """BatchNorm1d on the pooled feature (BNNeck, Luo et al. 2019), (b, C) -> (b, C); its bias is 0 and not trained."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.bias.requires_grad_(False)
