"""Network, freezing and weights (formulas.md: Network)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ecn_dist.errors import UserError
from ecn_dist.methods.source_only import SourceOnly
from ecn_dist.models import Backbone, export_weights, load_backbone, load_weights, normalized_features
from tests.networks import source_network

HEIGHT, WIDTH = 64, 32


def new_network(arch: str = "small_resnet", num_identities: int = 7, seed: int = 0) -> SourceOnly:
    torch.manual_seed(seed)
    return source_network(arch, num_identities=num_identities)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("arch", "num_features"),
    [("small_resnet", 256), ("resnet18", 512), ("mobilenet_v2", 1280), ("mobilenet_v3_small", 576)],
)
def test_backbones_give_the_pooled_feature(arch: str, num_features: int) -> None:
    backbone = Backbone(arch, HEIGHT, WIDTH).eval()
    assert backbone.num_features == num_features
    features = normalized_features(backbone, images())
    assert features.shape == (4, num_features)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


def test_resnet_feature_is_the_global_average_of_its_last_stage() -> None:
    backbone = Backbone("resnet18", HEIGHT, WIDTH).eval()
    body = backbone.body
    x = body.maxpool(body.relu(body.bn1(body.conv1(images()))))
    for i in range(1, 5):
        x = body.get_submodule(f"layer{i}")(x)
    torch.testing.assert_close(backbone(images()), x.mean((2, 3)))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet5", "did you mean resnet50"),
        ("squeezenet1_0", "no pooled feature"),
        ("vit_b_16", "does not take 64 x 32"),
    ],
)
def test_unfit_architectures_say_why(arch: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Backbone(arch, HEIGHT, WIDTH)


def test_frozen_stages_of_a_resnet() -> None:
    backbone = Backbone("resnet18", HEIGHT, WIDTH)
    backbone.freeze(3, shortcut_batchnorm_trains=True)
    backbone.train()
    frozen = ("conv1", "bn1", "layer1", "layer2")
    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen)), name
    training = {name for name, module in backbone.body.named_modules() if "bn" in name and module.training}
    assert training == {f"layer{i}.{j}.bn{n}" for i in (3, 4) for j in (0, 1) for n in (1, 2)}
    assert backbone.body.layer2[0].downsample[1].training  # the published code's slip
    backbone.eval()
    assert not any(module.training for module in backbone.modules())


def test_frozen_shortcut_batchnorm_stays_still_unless_asked_for() -> None:
    backbone = Backbone("resnet18", HEIGHT, WIDTH)
    backbone.freeze(3, shortcut_batchnorm_trains=False)
    assert not backbone.train().body.layer2[0].downsample[1].training


def test_frozen_parameters_are_in_no_optimizer_group() -> None:
    network = new_network("resnet18")
    network.backbone.freeze(3, shortcut_batchnorm_trains=False)
    groups = {group["name"]: group for group in network.parameter_groups(lr=0.1, backbone_lr=0.01)}
    assert (groups["new"]["lr"], groups["backbone"]["lr"]) == (0.1, 0.01)
    given = [p for group in groups.values() for p in group["params"]]
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(given) == len(trained)
    assert {id(p) for p in given} == {id(p) for p in trained}


def test_export_is_read_back_with_torchvision_names(tmp_path: Path) -> None:
    network, other = new_network("resnet18"), new_network("resnet18", seed=1)
    export_weights(network, tmp_path / "weights.safetensors")
    assert "layer4.1.bn2.running_var" in load_file(tmp_path / "weights.safetensors")
    assert load_weights(other, str(tmp_path / "weights.safetensors")) == []
    for (name, a), (_, b) in zip(network.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_equal_networks_give_equal_files(tmp_path: Path) -> None:
    network = new_network()
    files = set()
    for _ in range(8):
        export_weights(network, tmp_path / "weights.safetensors")
        files.add((tmp_path / "weights.safetensors").read_bytes())
    assert len(files) == 1


def test_heads_of_other_methods_are_left_alone_and_own_ones_are_read(tmp_path: Path) -> None:
    network, other, plain = new_network(), new_network(seed=1), new_network(seed=2)
    for with_head in (network, other):
        with_head.add_module("triplet_head", nn.Linear(16, 4))
    export_weights(network, tmp_path / "weights.safetensors")
    for reader in (other, plain):
        assert load_weights(reader, str(tmp_path / "weights.safetensors")) == []
        for name, tensor in reader.state_dict().items():
            assert torch.equal(tensor, network.state_dict()[name]), name


def test_backbone_weights_with_a_foreign_classifier_fit(tmp_path: Path) -> None:
    network = new_network("resnet18")
    tensors = {f"module.{key}": value + 1 for key, value in network.backbone.body.state_dict().items()}
    torch.save({"state_dict": tensors | {"module.fc.weight": torch.zeros(1000, 512)}}, tmp_path / "weights.pth")
    other = new_network("resnet18", seed=1)
    assert load_weights(other, str(tmp_path / "weights.pth")) == []
    torch.testing.assert_close(other.backbone.body.conv1.weight, network.backbone.body.conv1.weight + 1)


def test_source_head_of_other_identities_is_noted_and_starts_anew(tmp_path: Path) -> None:
    export_weights(new_network(num_identities=9), tmp_path / "weights.safetensors")
    notes = load_weights(new_network(num_identities=7), str(tmp_path / "weights.safetensors"))
    assert len(notes) == 1
    assert "source_head" in notes[0]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda tensors: tensors.pop("stages.1.conv1.weight"), "missing: stages.1.conv1.weight"),
        (lambda tensors: tensors.update({"stages.9.conv.weight": torch.zeros(1)}), "unexpected: stages.9"),
        (
            lambda tensors: tensors.update({"stem.0.weight": torch.zeros(32, 3, 7, 7)}),
            "of another shape: stem.0.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_name_the_tensors(break_it, message: str, tmp_path: Path) -> None:
    backbone = new_network().backbone
    tensors = dict(backbone.body.state_dict())
    break_it(tensors)
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=message):
        load_backbone(backbone, str(tmp_path / "weights.safetensors"))


def test_unreadable_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"not a torch file")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(new_network(), str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match="there is no file"):
        load_weights(new_network(), str(tmp_path / "absent.pth"))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(new_network(), str(tmp_path / "weights.pth"))
    assert not (tmp_path / "ran").exists()


def test_imagenet_weights_are_never_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="nothing is downloaded; fetch them"):
        load_weights(new_network("resnet18"), "imagenet")
