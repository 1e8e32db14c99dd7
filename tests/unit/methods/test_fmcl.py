"""FMCL's passes, losses and state changes (formulas.md: fmcl)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ecn_dist import config as configuration
from ecn_dist.errors import UserError
from ecn_dist.methods import describe
from ecn_dist.methods.base import Step
from ecn_dist.methods.fmcl.method import FMCL
from ecn_dist.methods.fmcl.options import FMCLOptions
from ecn_dist.methods.options import LossOptions, MemoryOptions
from tests import reference
from tests.networks import batch, setting

AT = Step(3, 0, source_only=False)
LATER = Step(3, 1, source_only=False)
LABELS, INDICES = torch.tensor([0, 1, 6, 3]), torch.tensor([7, 0, 8, 3])


def new_fmcl(num_neighbors: int = 3, **options: Any) -> FMCL:
    torch.manual_seed(0)
    loss = LossOptions(target_weight=0.3, num_neighbors=num_neighbors, neighbors_from_epoch=1)
    given: dict[str, Any] = {"own": FMCLOptions(**options), "loss": loss, "memory": MemoryOptions(temperature=0.07)}
    fmcl = FMCL(setting(num_exemplars=9, dtype=torch.float64, **given)).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in fmcl.encoder.parameters():  # other weights than the network's
            parameter += 0.05 * torch.randn_like(parameter)
    return fmcl


def images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(4, 3, 64, 32, generator=generator, dtype=torch.float64) for name in ("source", "target")}


def batches() -> dict[str, Any]:
    return {"source": batch(LABELS), "target": batch(None, INDICES)}


def new_rows() -> torch.Tensor:
    rows = F.normalize(torch.randn(9, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64), dim=1)
    rows[[1, 3]] = 0.0  # not written yet
    return rows


@pytest.mark.parametrize(("at", "num_neighbors"), [(AT, 0), (LATER, 3)])
def test_losses_are_those_of_the_formula(at: Step, num_neighbors: int) -> None:
    fmcl, shown, rows = new_fmcl(soft_weight=0.8), images(), new_rows()
    for dropout in (fmcl.source_dropout, fmcl.target_dropout, fmcl.soft_dropout):
        dropout.probability = 0.0
    fmcl.memory.load_full(rows)
    losses = fmcl.losses(fmcl(shown, at), batches(), at)

    z_source, z = (fmcl.embedding(fmcl.backbone(shown[name])) for name in ("source", "target"))
    encoder: Any = fmcl.encoder.network
    z_e = encoder.embedding(encoder.backbone(shown["target"])).detach()
    f, e = z / z.norm(dim=1, keepdim=True), z_e / z_e.norm(dim=1, keepdim=True)
    source = F.cross_entropy(fmcl.source_head(torch.relu(z_source)), LABELS)
    target, _ = reference.bank_loss(f, INDICES, e, rows, rows.any(dim=1), num_neighbors=num_neighbors)
    wanted = torch.softmax(encoder.source_head(torch.relu(z_e)), dim=1).detach()
    soft = -(wanted * torch.log_softmax(fmcl.source_head(torch.relu(z)), dim=1)).sum(dim=1).mean()
    expected = {"loss_source": source, "loss_target": target.mean(), "loss_soft": soft}
    expected["loss"] = 0.7 * source + 0.3 * target.mean() + 0.8 * soft
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=0)


def test_the_encoder_drops_nothing_and_has_no_gradient() -> None:
    fmcl, shown = new_fmcl().train(), images()
    outputs = fmcl(shown, AT)
    encoder: Any = fmcl.encoder.network
    torch.testing.assert_close(outputs["positives"], encoder.embedding(encoder.backbone(shown["target"])))
    assert (outputs["features"] == 0).any()
    assert not outputs["positives"].requires_grad
    assert not outputs["soft"].requires_grad
    fmcl.losses(outputs, batches(), AT)["loss"].backward()
    assert all(parameter.grad is None for parameter in fmcl.encoder.parameters())
    trained = {id(p) for group in fmcl.parameter_groups(lr=1.0, backbone_lr=1.0) for p in group["params"]}
    assert not trained & {id(parameter) for parameter in fmcl.encoder.parameters()}


@pytest.mark.parametrize(
    ("at", "a"),
    [(Step(3, -1, source_only=True), 0.1), (AT, 0.1), (LATER, 0.9)],
    ids=["source only", "at first", "later"],
)
def test_state_changes_after_a_step(at: Step, a: float) -> None:
    fmcl, rows = new_fmcl(first_momentum=0.1, momentum=0.9, momentum_from_epoch=1), new_rows()
    fmcl.memory.load_full(rows)
    outputs = fmcl(images(), AT)
    before, weights = (
        {name: tensor.clone() for name, tensor in network.state_dict().items()} for network in (fmcl.encoder, fmcl)
    )
    fmcl.finish_step(outputs, batches(), False, at)  # not taken
    assert all(torch.equal(tensor, before[name]) for name, tensor in fmcl.encoder.state_dict().items())
    torch.testing.assert_close(fmcl.memory.full(), rows, rtol=0, atol=1e-15)

    fmcl.finish_step(outputs, batches(), True, at)
    for name, tensor in fmcl.encoder.state_dict().items():
        if tensor.is_floating_point():
            mean = a * before[name] + (1 - a) * weights[name.removeprefix("network.")]
            torch.testing.assert_close(tensor, mean, rtol=1e-12, atol=1e-14, msg=name)
    if not at.source_only:
        rows[INDICES] = F.normalize(outputs["positives"], dim=1)
    torch.testing.assert_close(fmcl.memory.full(), rows, rtol=0, atol=1e-12)


def test_the_encoder_starts_as_the_network_and_is_what_is_evaluated() -> None:
    fmcl = new_fmcl()
    fmcl.started_from("a file")
    for name, tensor in fmcl.encoder.network.state_dict().items():
        assert torch.equal(tensor, fmcl.state_dict()[name]), name
    assert fmcl.evaluated is fmcl.encoder.network.backbone
    assert fmcl.evaluated is not fmcl.backbone


def test_options_are_checked_and_told() -> None:
    places = ["--method", "fmcl", "--source", "s", "--target", "t", "--output_dir", "o", "--epochs", "200"]
    for options, text in (
        (["--model.batchnorm", "local"], "model.batchnorm: with local statistics every rank"),
        (["--fmcl.momentum", "1"], "fmcl.momentum: 1.0 must be at least 0 and below 1"),
        (["--memory.momentum", "0.5"], "memory.momentum: method fmcl has no use for it"),
    ):
        with pytest.raises(UserError, match=text):
            configuration.parse([*places, *options], "test", "").check()
    config = configuration.parse(places, "test", "")
    config.check()
    assert "momentum encoder" in describe(configuration.flatten(config))
    with pytest.raises(UserError, match="only 9 training pictures"):
        new_fmcl(num_neighbors=10)
