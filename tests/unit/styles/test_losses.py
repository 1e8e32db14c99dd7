"""The losses against a plain float64 reference, picture by picture, and its gradients by finite differences."""

import math

import pytest
import torch
from torch import Tensor

from ecn_dist.styles.losses import critic_losses, generator_losses
from ecn_dist.styles.networks import Discriminator, Generator, Shape

HEIGHT, WIDTH, CAMERAS, b = 16, 8, 3, 4


@pytest.fixture
def networks() -> tuple[Generator, Discriminator]:
    torch.manual_seed(0)
    generator = Generator(Shape(("1", "2", "5"), HEIGHT, WIDTH, channels=4, blocks=1)).double()
    discriminator = Discriminator(CAMERAS, HEIGHT, WIDTH, channels=4).double()
    with torch.no_grad():  # of its own, a random network's gradient is next to 0
        for parameter in discriminator.parameters():
            parameter.mul_(3)
    return generator, discriminator


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    real, fake = torch.rand(2, b, 3, HEIGHT, WIDTH, generator=draws, dtype=torch.float64) * 2 - 1
    mixing_b = torch.rand(b, generator=draws, dtype=torch.float64)
    return real, fake, torch.tensor([0, 2, 1, 0]), torch.tensor([2, 0, 0, 1]), mixing_b


def cross_entropy(logits_C: Tensor, camid: int) -> Tensor:
    return -(logits_C[camid] - logits_C.exp().sum().log())


def test_critic(networks, pictures) -> None:
    _, discriminator = networks
    real, fake, camids_b, _, mixing_b = pictures
    critic, penalty, camera = 0.0, 0.0, 0.0
    for at in range(b):
        mixed = mixing_b[at] * real[at] + (1 - mixing_b[at]) * fake[at]
        slope = torch.autograd.functional.jacobian(lambda x: discriminator(x[None])[0].sum(), mixed)
        penalty += (math.sqrt((slope**2).sum()) - 1) ** 2 / b
        scores, logits = discriminator(real[at : at + 1])
        critic += (discriminator(fake[at : at + 1])[0].mean() - scores.mean()).item() / b
        camera += cross_entropy(logits[0], int(camids_b[at])).item() / b
    found = critic_losses(discriminator, real, fake, camids_b, mixing_b)
    assert found.keys() == {"critic", "penalty", "camera_real"}
    for name, expected in (("critic", critic), ("penalty", penalty), ("camera_real", camera)):
        assert found[name].item() == pytest.approx(expected, rel=1e-10), name
    assert penalty > 0.01


def test_the_penaltys_gradient_is_that_of_finite_differences(networks, pictures) -> None:
    _, discriminator = networks
    real, fake, camids_b, _, mixing_b = pictures

    def penalty() -> Tensor:
        return critic_losses(discriminator, real, fake, camids_b, mixing_b)["penalty"]

    for weight in (discriminator.patches.weight, discriminator.layers[0].weight):
        (gradient,) = torch.autograd.grad(penalty(), weight)
        for at in (0, weight.numel() // 2):
            values = []
            for change in (1e-6, -1e-6):
                with torch.no_grad():
                    weight.view(-1)[at] += change
                values.append(penalty().item())
                with torch.no_grad():
                    weight.view(-1)[at] -= change
            assert gradient.flatten()[at].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_generator(networks, pictures) -> None:
    generator, discriminator = networks
    real, _, camids_b, wanted_b, _ = pictures
    score, camera, cycle = 0.0, 0.0, 0.0
    for at in range(b):
        copy = generator(real[at : at + 1], wanted_b[at : at + 1])
        scores, logits = discriminator(copy)
        score -= scores.mean().item() / b
        camera += cross_entropy(logits[0], int(wanted_b[at])).item() / b
        back = generator(copy, camids_b[at : at + 1])
        cycle += (back[0] - real[at]).abs().sum().item() / (3 * HEIGHT * WIDTH) / b
    found = generator_losses(generator, discriminator, real, camids_b, wanted_b)
    for name, expected in (("generator", score), ("camera", camera), ("cycle", cycle)):
        assert found[name].item() == pytest.approx(expected, rel=1e-10), name


def test_no_gradient_where_the_critics_slope_is_0(networks, pictures) -> None:
    """The norm has no derivative there; a step must not turn to NaN."""
    _, discriminator = networks
    real, fake, camids_b, _, mixing_b = pictures
    with torch.no_grad():
        discriminator.patches.weight.zero_()
    loss = critic_losses(discriminator, real, fake, camids_b, mixing_b)["penalty"]
    assert loss.item() == 1
    (gradient,) = torch.autograd.grad(loss, discriminator.patches.weight)
    assert torch.isfinite(gradient).all()
