"""What a checkpoint tells the cluster method of its clusters: parts that do not fit each other are refused."""

import pytest
import torch
from torch import Tensor

from ecn_dist.errors import UserError
from ecn_dist.methods.base import TargetPictures
from ecn_dist.methods.cluster.method import Cluster
from ecn_dist.methods.cluster.options import ClusterOptions
from ecn_dist.models import Backbone
from tests.networks import setting

CAMIDS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
LABELS = torch.tensor([0, 0, 0, 1, 1, -1, -1, 1])


def new_method(camera_weight: float = 0.5) -> Cluster:
    given = setting(own=ClusterOptions(camera_weight=camera_weight))
    target = TargetPictures(len(CAMIDS), 3, CAMIDS, None)
    return Cluster(type(given)(**(vars(given) | {"target": target, "backbone": Backbone("small_resnet", 64, 32)})))


def trained(camera_weight: float = 0.5) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes and state of a method whose clusters are `LABELS`."""
    method = new_method(camera_weight)
    method.labels_N.copy_(LABELS)
    method._make_memories(2)
    for memory in method.memories().values():
        memory.load_full(torch.randn(memory.num_exemplars, memory.dim))
    return method.sizes(), {key: tensor.clone() for key, tensor in method.state().items()}


@pytest.mark.parametrize("camera_weight", [0.0, 0.5])
def test_what_was_kept_comes_back(camera_weight: float) -> None:
    sizes, state = trained(camera_weight)
    assert sizes == {"clusters": 2, "proxies": 5 if camera_weight else 0}
    method = new_method(camera_weight)
    method.resize(sizes)
    method.load_state(state)
    assert torch.equal(method.labels_N, LABELS)
    for key, tensor in method.state().items():
        assert torch.equal(tensor, state[key]), key
    if camera_weight:
        assert method.own_proxies_C2.tolist() == [[0, 3], [3, 5]]


def test_before_the_first_epoch() -> None:
    method = new_method()
    sizes, state = method.sizes(), method.state()
    again = new_method()
    again.resize(sizes)
    again.load_state(state)
    again.resize({})  # of a run of another method that was allowed to go on as this one


@pytest.mark.parametrize("sizes", [{"clusters": 9, "proxies": 5}, {"clusters": 2, "proxies": 2**50}])
def test_more_clusters_than_pictures(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="of 8 pictures: it is damaged, or of other data"):
        new_method().resize(sizes)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (-2, "labels from -2 to 1 for 2 clusters"),
        (2, "labels from -1 to 2 for 2 clusters"),
        (2**62, f"labels from -1 to {2**62} for 2 clusters"),
        (0, "5 camera proxies where its labels make 4"),
    ],
)
def test_labels_that_do_not_fit_the_memories(label: int, said: str) -> None:
    sizes, state = trained()
    state["cluster.labels"][7 if label else 3] = label
    method = new_method()
    method.resize(sizes)
    with pytest.raises(UserError, match=said) as caught:
        method.load_state(state)
    assert caught.value.on_all_ranks
