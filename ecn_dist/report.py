"""`report`: one self-contained report.html of a run."""

from pathlib import Path

from ecn_dist.command import verb
from ecn_dist.errors import UserError
from ecn_dist.reporting.report import write_report
from ecn_dist.reporting.run_reader import read_run


@verb(
    "report", "example: ecn-dist report --run runs/x --compare full=runs/x --compare full=runs/x2 --compare base=runs/y"
)
def main(*, run: Path, output: str | None = None, compare: list[str] | None = None) -> int:
    """Write one self-contained HTML file of a run.

    It shows configuration, training curves, results, ranked lists, failures and machine, loads nothing and needs no
    script, so it can be opened anywhere and passed on. It may be written while a run is going on: it then shows what
    there is. The pictures are those of RUN/figures/, which `train` draws at its end; the training curves are drawn anew
    from RUN/metrics.jsonl.

    Args:
        run: the run folder: the --output_dir of `train`
        output: the file to write (default: RUN/report.html)
        compare: NAME=RUN: add a row to a table of several runs; may be given more than once; runs of one name are
            seeds, shown as mean and spread
    """
    rows: dict[str, list[dict[str, float]]] = {}
    for pair in compare or ():
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--compare: {pair!r} is not NAME=RUN, such as 'source only=runs/a'")
        evaluation = read_run(folder).evaluation
        if not evaluation:
            raise UserError(f"--compare: {folder} has no evaluation in its summary.json; evaluate that run first")
        rows.setdefault(name, []).append(dict(evaluation))
    print(f"wrote {write_report(run, comparison=rows or None, output=output)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
