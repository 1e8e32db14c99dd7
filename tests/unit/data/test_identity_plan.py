"""P x K batches: full, each identity and each picture in its turn, and a function of labels and indices alone."""

from collections import Counter

import numpy as np
import pytest

from ecn_dist.data.draws import Address, Draws
from ecn_dist.data.identity_plan import IdentityPlan
from ecn_dist.data.plan import check_batch
from ecn_dist.errors import UserError

P, K = 4, 4
SIZES = [4, 9, 1, 6, 2, 13, 4, 5, 3, 8, 30]  # pictures of an identity: 11, no multiple of P


def pictures(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, exemplar indices and cameras of rows in no order, some of which take no part."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.concatenate([np.repeat(np.arange(len(SIZES)), SIZES), np.full(7, -1)]))
    return labels, rng.permutation(len(labels)), rng.integers(0, 3, len(labels))


def plan_of(labels: np.ndarray, indices: np.ndarray, camids: np.ndarray, **options: int) -> IdentityPlan:
    numbers = {"identities": P, "instances": K, "seed": 0, "epoch": 0} | options
    return IdentityPlan(labels, indices, camids, domain="target", **numbers)


def sequence(plan: IdentityPlan, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, B) rows and occurrence numbers."""
    planned = [plan.step(step) for step in range(steps)]
    return np.stack([step.rows_b for step in planned]), np.stack([step.occurrences_b for step in planned])


def test_batches_are_full_and_every_identity_comes_before_one_comes_again() -> None:
    labels, indices, camids = pictures()
    rows, _ = sequence(plan_of(labels, indices, camids), 66)
    groups = labels[rows].reshape(-1, P, K)
    assert (groups == groups[:, :, :1]).all()  # an identity's pictures lie side by side
    assert all(len(set(batch)) == P for batch in groups[:, :, 0].tolist())
    rounds = groups[:, :, 0].reshape(-1, len(SIZES))
    assert (np.sort(rounds) == np.arange(len(SIZES))).all()
    assert len({tuple(order) for order in rounds.tolist()}) == len(rounds)


def test_no_picture_comes_twice_before_the_others_of_its_identity() -> None:
    labels, indices, camids = pictures()
    rows, occurrences = sequence(plan_of(labels, indices, camids), 66)
    for identity, size in enumerate(SIZES):
        order = rows[labels[rows] == identity]
        numbers = occurrences[labels[rows] == identity]
        whole = len(order) // size * size
        assert (np.sort(order[:whole].reshape(-1, size)) == np.flatnonzero(labels == identity)).all()
        seen: Counter[int] = Counter()
        for row, number in zip(order.tolist(), numbers.tolist(), strict=True):
            assert number == seen[row]
            seen[row] += 1
        if size >= K:
            assert all(len(set(turn)) == K for turn in order.reshape(-1, K).tolist())
    assert set(rows.ravel().tolist()) == set(np.flatnonzero(labels >= 0).tolist())


def test_other_cameras_come_first() -> None:
    labels = np.repeat(np.arange(P), 8)
    camids = np.tile(np.repeat([0, 1], [6, 2]), P)  # two pictures of a rare camera
    rows, _ = sequence(plan_of(labels, np.arange(len(labels)), camids), 1)
    assert (np.sort(camids[rows].reshape(P, K)) == [0, 0, 1, 1]).all()
    assert camids[rows].reshape(P, K)[:, :2].sum(axis=1).tolist() == [1] * P
    two = [Counter(camids[plan_of(labels, np.arange(32), camids, instances=2).step(0).rows_b].tolist())]
    assert two == [Counter({0: P, 1: P})]


def test_epochs_and_seeds_differ_and_any_step_can_be_asked_for_first() -> None:
    given = pictures()
    rows, occurrences = sequence(plan_of(*given), 30)
    for other in (plan_of(*given, epoch=1), plan_of(*given, seed=1)):
        assert (sequence(other, 30)[0] == rows).mean() < 0.2
    resumed = plan_of(*given).step(20)
    assert resumed.rows_b.tolist() == rows[20].tolist()
    assert resumed.occurrences_b.tolist() == occurrences[20].tolist()
    assert plan_of(*given, epoch=5).step(3).pass_number == 5


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_the_ranks_parts_are_the_global_batch(world_size: int) -> None:
    given = pictures()
    plan = plan_of(*given)
    check_batch(plan.global_batch_size, plan.streams, world_size)
    for step in range(5):
        parts = [plan.step(step, rank, world_size) for rank in range(world_size)]
        whole = plan_of(*given).step(step)
        assert np.concatenate([part.rows_b for part in parts]).tolist() == whole.rows_b.tolist()
        assert np.concatenate([part.occurrences_b for part in parts]).tolist() == whole.occurrences_b.tolist()
        if world_size <= P:
            assert all(len(set(given[0][part.rows_b].tolist())) == P // world_size for part in parts)


def test_the_order_of_the_rows_plays_no_part() -> None:
    labels, indices, camids = pictures()
    shuffled = np.random.default_rng(1).permutation(len(labels))
    rows, _ = sequence(plan_of(labels, indices, camids), 30)
    others, _ = sequence(plan_of(labels[shuffled], indices[shuffled], camids[shuffled]), 30)
    assert (indices[rows] == indices[shuffled][others]).all()


def test_a_permutation_of_indices_and_labels_can_be_carried_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other exemplar indices and cluster numbers, with the draws that belong to them, give the same batches."""
    labels, indices, camids = pictures()
    rows, occurrences = sequence(plan_of(labels, indices, camids), 30)
    rng = np.random.default_rng(2)
    of_index, of_label = rng.permutation(len(indices)), rng.permutation(len(SIZES))
    order = Draws.order

    def carried(self: Draws, address: Address) -> np.ndarray:
        first, numbers, third = address
        back = np.argsort(of_label) if self is renamed._identity_draws else np.argsort(of_index)
        return order(self, (first, back[numbers], third))

    renamed = plan_of(np.where(labels < 0, -1, of_label[labels]), of_index[indices], camids)
    monkeypatch.setattr(Draws, "order", carried)
    others, other_occurrences = sequence(renamed, 30)
    assert (others == rows).all()
    assert (other_occurrences == occurrences).all()


def test_a_stand_in_is_of_the_same_identity() -> None:
    labels, indices, camids = pictures()
    plan = plan_of(labels, indices, camids)
    for row in np.flatnonzero(labels >= 0):
        stand_ins = plan.stand_ins(int(row))
        assert len(set(stand_ins.tolist())) == len(stand_ins) == min(SIZES[labels[row]] - 1, 16)
        assert (labels[stand_ins] == labels[row]).all()
        assert row not in stand_ins


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"identities": 12}, "target: 11 identities are fewer than the 12 of a batch; take fewer"),
        ({"instances": 0}, "both must be at least 1"),
    ],
)
def test_what_makes_no_batch_is_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(UserError, match=text):
        plan_of(*pictures(), **options)
    plan = plan_of(*pictures())
    with pytest.raises(UserError, match="16 does not divide by 3 ranks; 15 would, or use 1, 2, 4, 8, 16 ranks"):
        check_batch(plan.global_batch_size, plan.streams, 3)
