"""What commands share: how they end, and types of options."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Protocol

from ecn_dist import distributed
from ecn_dist.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option (of argparse) that takes a whole number from `least` on."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return whole_number


class Main(Protocol):
    """`main(argv)`, or `main()` to read the process's own command line; returns the exit status."""

    def __call__(self, argv: list[str] | None = None) -> int: ...


def command(main: Main) -> Main:
    """Decorate a `main(argv) -> exit status`: a `UserError` becomes its text on standard error and exit status 2.

    Before the process group is up every rank meets the same mistake, and after it mistakes are raised together, so
    rank 0 speaks for all; an error of one rank alone is shown by that rank. A collective that fails because another
    rank is gone is explained, and ends with status 69. Any other exception is a bug and keeps its traceback. The
    process group is left on the way out.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            shared = error.on_all_ranks or not distributed.is_distributed()
            if os.environ.get("RANK", "0") == "0" or not shared:
                print(f"error: {error}", file=sys.stderr, flush=True)
            if not shared:
                distributed.report_failure(error)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED
        except Exception as error:
            distributed.report_failure(error)
            raise
        finally:
            distributed.end()

    return run
