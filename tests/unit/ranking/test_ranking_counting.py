"""What exact counting stands on: the product's error bound, the buckets, exact distances, full precision."""

import pytest
import torch

from ecn_dist.ranking.counting import MARGIN, Buckets
from ecn_dist.ranking.distances import PairDistances, ProductSpace, full_precision

CPU = torch.device("cpu")


def features(kind: str, size: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(size, dim, generator=generator)
    match kind:
        case "positive":
            return torch.nn.functional.normalize(x.relu())
        case "far":
            return x + 100
        case "decaying":
            return x * torch.logspace(0, -6, dim)
        case "rank-1":
            return x[:, :1] + 1e-3 * x
        case "one line":  # products of equal entries: roundings repeat, and their errors all add up
            signs = torch.randn(size, 1, generator=generator).sign()
            return (signs * (0.1 + 0.01 * torch.rand(size, 1, generator=generator))).expand(-1, dim).contiguous()
        case "outliers":
            return torch.where((torch.arange(size) % 7 == 0)[:, None], 100 * x, x)
    return x


@pytest.mark.parametrize("dim", [1, 3, 64, 512, 2048, 16384])
@pytest.mark.parametrize("kind", ["normal", "positive", "far", "decaying", "rank-1", "one line", "outliers"])
def test_products_keep_well_inside_their_error_bound(kind: str, dim: int) -> None:
    x = features(kind, 240, dim)
    space = ProductSpace(x[:40], x[40:], CPU, 0, 2**26)
    queries = torch.arange(40)
    exact = torch.cdist(x[:40].double(), x[40:].double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact = (exact * space.factor).square()
    lines = Buckets(exact.sort().values[:, 5:30], torch.ones(40, 25).bool(), space.error_bound(queries), 1024)
    left = space.query_side(queries, lines.origin, lines.scale, MARGIN)
    line = space.multiply(left, torch.arange(200))[:, :200]
    true_line = MARGIN + lines.scale[:, None] * (exact - lines.origin[:, None])
    on_it = (true_line > 0) & (true_line < 1024)
    assert on_it.sum() >= 40 * 25
    error = (line - true_line).abs() / lines.reach
    assert error[on_it].max() < 0.5


@pytest.mark.parametrize("num_matches", [1, 2, 9, 40])
def test_buckets_never_misplace(num_matches: int) -> None:
    generator = torch.Generator().manual_seed(num_matches)
    rows, error, num_buckets = 60, 3e-4, 1024
    squared = torch.rand(rows, num_matches, generator=generator, dtype=torch.float64)
    # Some equal, some closer than the error, some just further apart.
    copies = torch.randint(0, num_matches, (rows, num_matches), generator=generator)
    squared = squared.gather(1, copies) + error * torch.randint(-3, 4, (rows, num_matches), generator=generator) / 2
    count = torch.randint(1, num_matches + 1, (rows,), generator=generator)
    valid = torch.arange(num_matches) < count[:, None]
    squared = squared.masked_fill(~valid, torch.inf).sort().values
    lines = Buckets(squared, valid, torch.full((rows,), error, dtype=torch.float64), num_buckets)

    near = squared.nan_to_num(posinf=1.0).repeat(1, 9)
    near = near + error * 2 * (2 * torch.rand(near.shape, generator=generator, dtype=torch.float64) - 1)
    values = torch.cat([near, torch.rand(rows, 300, generator=generator, dtype=torch.float64) * 3 - 1], dim=1)
    line = (MARGIN + lines.scale[:, None] * (values - lines.origin[:, None])).float()
    below = (squared[:, None, :] < values[:, :, None]).sum(2)
    distance = (squared[:, None, :] - values[:, :, None]).abs().amin(2)

    row = torch.arange(rows)[:, None].expand_as(line)
    code = lines.lookup(line).view_as(line) - lines.codes_per_row * row
    sure = code % 2 == 0
    assert torch.equal(code[sure], 2 * below[sure])
    assert (distance[sure] > 0.99 * error).all()
    assert sure.double().mean() > 0.2

    searched = lines.search(row[~sure], line[~sure])
    found = searched % 2 == 0
    assert torch.equal(searched[found], 2 * below[~sure][found])
    assert (distance[~sure][found] > 0.99 * error).all()
    assert (distance[~sure][~found] < 1.2 * error + 1e-3 / num_buckets).all()


@pytest.mark.parametrize("dim", [1, 5, 33, 256])
def test_exact_distances_do_not_depend_on_their_company(dim: int) -> None:
    x = features("normal", 400, dim)
    x[300:] = x[200:300]
    distances = PairDistances(x[:100], x[100:], CPU)
    queries = torch.arange(100).repeat_interleave(300)
    pictures = torch.arange(300).repeat(100)
    together = distances(queries, pictures).view(100, 300)
    assert torch.equal(together[:, 100:200], together[:, 200:])
    order = torch.randperm(30000, generator=torch.Generator().manual_seed(0))[:777]
    assert torch.equal(distances(queries[order], pictures[order]), together.flatten()[order])
    expected = (x[:100, None].double() - x[None, 100:].double()).square().sum(2).sqrt()
    torch.testing.assert_close(together, expected, rtol=1e-14, atol=0)


def test_full_precision_inside_and_as_before_outside() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x = torch.randn(4, 4, requires_grad=True)

    def interrupted() -> None:
        with full_precision(CPU):
            assert (x @ x).dtype == torch.float32
            assert not (x @ x).requires_grad
            assert matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise KeyError

    try:
        matmul.fp32_precision = "tf32"  # as a training may have set it
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(KeyError):
                interrupted()
            assert (x @ x).dtype == torch.bfloat16
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
