"""Two versions of the project on the same work, in one run: `python -m benchmarks compare SNIPPET --against CHECKOUT`.

A snippet is a Python file that makes ready what it needs and defines `run()`; benchmarks/snippets has some. One process
for each checkout loads it with that checkout's package, and the two run it in turn, one at a time, so that both see the
same machine. Reported are the medians, the spread (first and third quartile), and the ratio round by round.
"""

import argparse
import contextlib
import inspect
import os
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from ecn_dist.errors import UserError

HERE = Path(__file__).resolve().parents[1]


def serve(snippet: str) -> None:
    """In the process of a checkout: tell which package this is, then time a run for every line that is read."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the snippet prints is no answer
    namespace = runpy.run_path(snippet)
    namespace["run"]()
    print(sys.modules["ecn_dist"].__file__, file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        namespace["run"]()
        print(time.perf_counter() - start, file=answers, flush=True)


class Side:
    """A checkout at work."""

    def __init__(self, checkout: Path, snippet: Path, python: str) -> None:
        # The checkout comes first on the path, so that its own package is found before any other. `serve` goes there as
        # text: the other checkout has another `benchmarks`, or none.
        code = f"import runpy, sys, time\n{inspect.getsource(serve)}\nserve({str(snippet.resolve())!r})"
        self.process = subprocess.Popen(
            [python, "-P", "-c", code],
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.checkout = checkout

    def answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if not line:
            raise UserError(f"{self.checkout}: the snippet failed (see above); it must run in both checkouts")
        return line

    def ready(self) -> None:
        """Wait for its first run."""
        package = Path(self.answer())
        if not package.is_relative_to(self.checkout):
            raise UserError(f"{self.checkout}: the snippet took the package {package}, so nothing would be compared")

    def run(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.seconds.append(float(self.answer()))

    def __enter__(self) -> "Side":
        self.seconds: list[float] = []
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def compare(snippet: Path, checkouts: list[Path], rounds: int, python: str = sys.executable) -> list[list[float]]:
    """The seconds of each round in each checkout. The order is turned round every other round."""
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(Side(checkout.resolve(), snippet, python)) for checkout in checkouts]
        for side in sides:
            side.ready()
        for number in range(rounds):
            for side in sides[:: 1 if number % 2 == 0 else -1]:
                side.run()
        return [side.seconds for side in sides]


def main(argv: list[str] | None = None) -> int:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("snippet", type=Path, help="a file, such as benchmarks/snippets/memory.py")
    parser.add_argument("--against", type=Path, required=True, metavar="CHECKOUT", help="the other version's folder")
    parser.add_argument("--rounds", type=int, default=10, help="of both in turn (%(default)s)")
    parser.add_argument(
        "--starts", type=int, default=1, help="of fresh processes: where memory lies, counts (%(default)s)"
    )
    parser.add_argument("--python", default=sys.executable, help="the interpreter for both (this one)")
    options = parser.parse_args(argv)
    for path in (options.snippet, options.against / "ecn_dist"):
        if not path.exists():
            raise UserError(f"{path} does not exist")
    if options.rounds < 2 or options.starts < 1:
        found = f"--rounds {options.rounds}, --starts {options.starts}"
        raise UserError(f"{found}: at least 2 rounds of 1 start are needed to tell a spread")
    both: list[list[float]] = [[], []]
    for _ in range(options.starts):
        seconds_of = compare(options.snippet, [HERE, options.against], options.rounds, options.python)
        both = [before + seconds for before, seconds in zip(both, seconds_of, strict=True)]
    rows = []
    for checkout, seconds in zip((HERE, options.against.resolve()), both, strict=True):
        first, median, third = statistics.quantiles(seconds, n=4)
        rows.append({"checkout": str(checkout), "median s": median, "quartiles s": f"{first:.4g} to {third:.4g}"})
    ratios = sorted(other / own for own, other in zip(*both, strict=True))
    first, median, third = statistics.quantiles(ratios, n=4)
    print(harness.markdown_table(rows))
    print(f"\n{options.snippet.stem}, {len(ratios)} rounds: the other takes {median:.3f} times as long", end="")
    print(f" (quartiles {first:.3f} to {third:.3f})")
    return 0
