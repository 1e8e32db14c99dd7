"""`report`: one self-contained report.html of a run."""

import argparse
import sys
from pathlib import Path

from ecn_dist.command import command
from ecn_dist.errors import UserError
from ecn_dist.reporting.comparison import Comparison
from ecn_dist.reporting.report import write_report
from ecn_dist.reporting.run_reader import read_run

DESCRIPTION = """\
Write one self-contained HTML file of a run: configuration, training curves, results, ranked lists, failures, machine.
It loads nothing and needs no script, so it can be opened anywhere and passed on. It may be written while a run is
going on: it then shows what there is. The pictures are those of RUN/figures/, which `train` draws at its end;
the training curves are drawn anew from RUN/metrics.jsonl."""

EXAMPLES = """\
examples:
  python -m ecn_dist.report --run runs/x
  python -m ecn_dist.report --run runs/x --compare "source only=runs/a" --compare "full=runs/x" --compare "full=runs/x2"
      a table of several runs; runs of one name are seeds, shown as mean and spread"""


@command
def main(argv: list[str] | None = None) -> int:
    """Write the report and print where it is."""
    parser = argparse.ArgumentParser(
        prog="ecn-dist report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, metavar="RUN", help="the run folder: the --output_dir of `train`")
    parser.add_argument("--output", metavar="FILE", help="the file to write (default: RUN/report.html)")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=RUN",
        help="add a row to a table of several runs; may be given more than once",
    )
    options = parser.parse_args(argv)
    comparison = _comparison(options.compare) if options.compare else None
    print(f"wrote {write_report(Path(options.run), comparison=comparison, output=options.output)}")
    return 0


def _comparison(pairs: list[str]) -> Comparison:
    rows: dict[str, list[dict[str, float]]] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--compare: {pair!r} is not NAME=RUN, such as 'source only=runs/a'")
        evaluation = read_run(folder).evaluation
        if not evaluation:
            raise UserError(f"--compare: {folder} has no evaluation in its summary.json; evaluate that run first")
        rows.setdefault(name, []).append(dict(evaluation))
    return Comparison(rows)


if __name__ == "__main__":
    sys.exit(main())
