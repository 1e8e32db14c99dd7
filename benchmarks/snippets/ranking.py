"""Ranking metrics of Market-1501's size. For `python -m benchmarks compare`."""

import torch

try:
    from ecn_dist.ranking import evaluate_ranking
except ImportError:  # version 0.1
    from ecn_dist.evaluation import evaluate_ranking

torch.set_num_threads(1)
torch.manual_seed(0)
centres = torch.randn(750, 2048)


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pids = torch.randint(750, (count,))
    features = torch.nn.functional.normalize(centres[pids] + 2.5 * torch.randn(count, 2048), dim=1)
    return features, pids, torch.randint(6, (count,))


query, gallery = draw(3368), draw(15913)


def run() -> None:
    evaluate_ranking(*query, *gallery)
