"""The momentum encoder against the formula, step by step."""

import torch
from torch import nn

from ecn_dist.models import Backbone, MomentumEncoder


def test_momentum_encoder_follows_the_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Backbone("small_resnet", 32, 16), nn.Linear(256, 4)).double().train()
    encoder = MomentumEncoder(network).train()
    assert not any(module.training for module in encoder.modules())
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    for a in (0.01, 0.5, 0.999):
        images = torch.randn(6, 3, 32, 16, dtype=torch.float64)
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        features = encoder(images)
        assert not features.requires_grad
        assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
        network(images).square().mean().backward()
        sgd.step()
        encoder.update(network, a)
        for name, tensor in network.state_dict().items():
            mean = a * expected[name] + (1 - a) * tensor
            expected[name] = mean if tensor.is_floating_point() else tensor.clone()
    assert [name for name, _ in encoder.named_parameters()] == [
        f"network.{name}" for name, _ in network.named_parameters()
    ]
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, expected[name.removeprefix("network.")], rtol=1e-12, atol=1e-14, msg=name)


def test_momentum_encoder_is_checkpointed() -> None:
    torch.manual_seed(0)
    first, second = (MomentumEncoder(Backbone("small_resnet", 32, 16)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    images = torch.randn(3, 3, 32, 16)
    assert torch.equal(first(images), second(images))
