"""What doctor finds between ranks that were started otherwise, or have folders of their own."""

from dataclasses import replace
from pathlib import Path

from ecn_dist import distributed
from ecn_dist.checks.group_checks import check_options, check_shared_folder
from ecn_dist.config import Config
from tests.ranks import RankPool


def check_findings(folder: str) -> None:
    shared = Config(source="s", target="t", output_dir=f"{folder}/0/run")
    own = replace(shared, output_dir=f"{folder}/{distributed.rank()}/run")
    other = replace(shared, seed=distributed.rank())
    data = {"source": str(distributed.rank())}
    for config, fingerprints, said in ((shared, {}, ""), (other, {}, "seed: 0 -> 1"), (shared, data, "data of source")):
        (found,) = check_options(config, fingerprints)
        assert found.ok == (not said)
        assert said in found.text
    for config, is_well in ((shared, True), (own, False)):
        (found,) = check_shared_folder(config)
        assert found.ok == is_well
    assert "ranks 1 do not see" in found.text
    assert check_shared_folder(replace(shared, output_dir="" if distributed.rank() else shared.output_dir)) == []


def test_ranks_that_differ(ranks: RankPool, tmp_path: Path) -> None:
    for name in "01":
        (tmp_path / name).mkdir()
    ranks(2).run(check_findings, str(tmp_path))
    assert not list(tmp_path.glob("*/*"))
