"""A step of the exemplar memory: loss, gradient, update. For `python -m benchmarks compare`."""

import torch

try:
    from ecn_dist.memory import ExemplarMemory
except ImportError:  # version 0.1
    from ecn_dist.ecn import ExemplarMemory

torch.set_num_threads(1)
torch.manual_seed(0)
memory = ExemplarMemory(32_621, 2048)
memory.load_full(torch.nn.functional.normalize(torch.randn(32_621, 2048), dim=1))
features = torch.nn.functional.normalize(torch.randn(128, 2048), dim=1).requires_grad_()
indices = torch.randperm(32_621)[:128]


def run() -> None:
    memory.loss(features, indices, 6).backward()
    memory.update(features.detach(), indices, 0.3)
