"""Run cases: `python -m tests.fuzz --cases 20000`; one again: `python -m tests.fuzz --seed 0 --case 1234`."""

import argparse
import faulthandler
import sys
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from random import Random

import torch

from tests.fuzz import material, model_cases, shard_cases
from tests.fuzz.harness import SECONDS, Target, limited_memory, run_case


def targets(made: material.Material) -> list[Target]:
    """Every kind of input."""
    shards, models = shard_cases, model_cases
    return [
        Target("shards", 30, partial(shards.make_shards, made), shards.read_shards),
        Target("picture", 40, partial(shards.make_picture, made), shards.read_a_picture),
        Target("weights", 12, partial(models.make_weights, made), models.read_weights),
        Target("checkpoint", 14, partial(models.make_checkpoint, made), partial(models.read_checkpoint, made)),
        Target("features", 14, partial(models.make_features, made), partial(models.read_features, made)),
        Target("generator", 4, partial(models.make_generator, made), models.read_generator),
        Target("configuration", 8, partial(models.make_config, made), partial(models.read_config, made)),
        Target("run", 4, partial(models.make_run, made), models.read_run),
    ]


def run(seed: int, numbers: range, *, only: str = "", seconds: float = float("inf"), root: Path) -> list[str]:
    """The failures of these cases of `seed`; no more are begun after so many seconds."""
    every = targets(material.make(root / "material"))
    chosen = [target for target in every if only in ("", target.name)]
    begun, counts, spent, failures = time.monotonic(), Counter[str](), defaultdict[str, float](float), list[str]()
    with limited_memory():
        for number in numbers:
            started = time.monotonic()
            if started - begun > seconds:
                break
            target = Random(f"{seed} {number} target").choices(chosen, [target.weight for target in chosen])[0]
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # for what no signal interrupts
            problem = run_case(target, seed, number, root / "case")
            faulthandler.cancel_dump_traceback_later()
            counts[target.name] += 1
            spent[target.name] += time.monotonic() - started
            if counts.total() % 1000 == 0:
                print(f"{counts.total()} cases: {len(failures)} failures, {time.monotonic() - begun:.0f} s", flush=True)
            if problem:
                again = f"python -m tests.fuzz --seed {seed} --case {number}" + (f" --only {only}" if only else "")
                failures.append(f"{problem}\nagain: {again}")
                print(failures[-1], end="\n\n", flush=True)
    told = ", ".join(f"{name} {n} ({1000 * spent[name] / n:.0f} ms each)" for name, n in sorted(counts.items()))
    print(f"{counts.total()} cases of seed {seed}: {len(failures)} failures; {told}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="Damaged and hostile input to every reader.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--only", default="", help="one kind of input")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    given = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    numbers = range(given.first, given.first + given.cases)
    if given.case is not None:
        numbers = range(given.case, given.case + 1)
    with tempfile.TemporaryDirectory() as root:
        failures = run(given.seed, numbers, only=given.only, seconds=given.seconds, root=Path(root).resolve())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
