"""The losses of StarGAN with the gradient penalty of WGAN-GP (Gulrajani et al. 2017); all are means over pictures.

b pictures here, H x W pixels. Each rank's losses are the means over its own part of the global batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ecn_dist.styles.networks import Discriminator, Generator


def critic_losses(
    discriminator: Discriminator, real_b3HW: Tensor, fake_b3HW: Tensor, camids_b: Tensor, mixing_b: Tensor
) -> dict[str, Tensor]:
    """Of the discriminator, on pictures and what the generator made of them (without its graph).

    `camids_b` are int64, who took the real ones; `mixing_b` in 0..1 is the share of the real picture in the mixture
    whose gradient is penalised. Returns `critic`: E[D(fake)] - E[D(real)]; `penalty`: E[(|grad D(mixture)| - 1)^2], the
    gradient being of the sum over patches; `camera_real`: cross-entropy of the camera of real pictures.
    """
    real, cameras = discriminator(real_b3HW)
    fake, _ = discriminator(fake_b3HW)
    mixed_b3HW = torch.lerp(fake_b3HW, real_b3HW, mixing_b[:, None, None, None]).requires_grad_()
    patches = discriminator(mixed_b3HW)[0].to(mixed_b3HW.dtype)
    (gradient_b3HW,) = torch.autograd.grad(patches.sum(), mixed_b3HW, create_graph=True)
    norm_b = torch.linalg.vector_norm(gradient_b3HW.flatten(1), dim=1)
    dtype = real_b3HW.dtype
    return {
        "critic": fake.to(dtype).mean() - real.to(dtype).mean(),
        "penalty": (norm_b - 1).square().mean(),
        "camera_real": F.cross_entropy(cameras.to(dtype), camids_b),
    }


def generator_losses(
    generator: Generator, discriminator: Discriminator, real_b3HW: Tensor, camids_b: Tensor, wanted_b: Tensor
) -> dict[str, Tensor]:
    """Of the generator.

    `generator`: -E[D(copy)]; `camera`: cross-entropy of the wanted camera in the copies; `cycle`: mean absolute
    difference between the pictures and what comes back when the copies are taken to their own cameras' style.
    """
    copy_b3HW = generator(real_b3HW, wanted_b)
    patches, cameras = discriminator(copy_b3HW)
    back_b3HW = generator(copy_b3HW, camids_b)
    dtype = real_b3HW.dtype
    return {
        "generator": -patches.to(dtype).mean(),
        "camera": F.cross_entropy(cameras.to(dtype), wanted_b),
        "cycle": (back_b3HW.to(dtype) - real_b3HW).abs().mean(),
    }
