"""What commands share: options from a function's signature, and how a command ends."""

import argparse
import errno
import functools
import inspect
import os
import socket
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from ecn_dist import distributed
from ecn_dist.errors import UserError, printable_lines
from ecn_dist.methods.options import Count, Natural, Range

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
_REMEDIES = {
    errno.ENOSPC: "free space on its disk",
    errno.EDQUOT: "free some of your quota on its disk",
    errno.EACCES: "correct its owner or rights, or name another place",
    errno.EPERM: "correct its owner or rights, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a part of its path is a file, not a folder; name another place",
    errno.ENOENT: "see that the path is right",
}
Main = Callable[..., int]  # main(argv), or main() to read the process's own command line; returns the exit status

# Options that several commands have.
Checkpoint = Annotated[Path, "the model: a run folder, a checkpoint, or a file of weights"]
RunConfig = Annotated[Path, "the run's configuration (YAML), if not found by --checkpoint"]
Device = Annotated[str, "auto (the accelerator, else the CPU), cpu, cuda, ..."]
BatchSize = Annotated[Count, "pictures a rank embeds at once"]
Loaders = Annotated[Natural, "loader processes a rank"]
Workers = Annotated[Count, "processes (default: one for each core, if it is worth it)"]


def _within(kind: type[float], bounds: Range) -> Callable[[str], float]:
    def number(text: str) -> float:
        with suppress(ValueError):
            if (value := kind(text)) in bounds:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} must be a {'whole ' * (kind is int)}number, {bounds}")

    return number


def add_options(parser: argparse.ArgumentParser, function: Callable[..., Any]) -> None:
    """Give `parser` an option for each parameter of `function`, described by its docstring's `Args`, or by a text.

    Keyword-only parameters are options, others are arguments without a name. A bool is a switch; a list that is
    required takes several values, any other may be given several times. `Literal`, `Annotated[T, choices]` with a
    tuple, with a `Range` of numbers (as `Count`), or with a function of the text say which values there are. A text in
    `Annotated` describes the option.
    """
    described = {p.arg_name: p.description or "" for p in docstring_parser.parse(function.__doc__ or "").params}
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if get_origin(kind) in (Union, types.UnionType):  # T | None
            kind = next(part for part in get_args(kind) if part is not type(None))
        notes, of = getattr(kind, "__metadata__", ()), getattr(kind, "__origin__", kind)
        text = next((note for note in notes if isinstance(note, str)), None) or described[name]
        required = parameter.default is inspect.Parameter.empty
        settings: dict[str, Any] = {"help": text.replace("\n", " ").replace("%", "%%")}
        if kind is bool:
            settings["action"] = "store_true"
        elif get_origin(kind) is list:
            settings |= {"type": get_args(kind)[0]} | ({"nargs": "+"} if required else {"action": "append"})
        else:
            rule: Any = get_args(kind) if of is Literal else next((n for n in notes if not isinstance(n, str)), of)
            if isinstance(rule, Range):
                rule = _within(of, rule)
            settings |= {"choices": rule} if isinstance(rule, tuple) else {"type": rule}
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            parser.add_argument(name, **settings)
            continue
        if not required and parameter.default is not None and kind is not bool:
            settings["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{name}", required=required, default=None if required else parameter.default, **settings)


def verb(name: str, more: str = "") -> Callable[[Callable[..., int]], Main]:
    """Decorate a documented function that returns an exit status: the `main` of `ecn-dist NAME`, as `command` ends it.

    `more` is what `--help` says below the options, such as examples.
    """

    def decorate(function: Callable[..., int]) -> Main:
        def main(argv: list[str] | None = None) -> int:
            about = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0]
            layout = argparse.RawDescriptionHelpFormatter
            parser = argparse.ArgumentParser(f"ecn-dist {name}", None, about, more, formatter_class=layout)
            parser.allow_abbrev = False
            add_options(parser, function)
            return function(**vars(parser.parse_args(argv)))

        return command(main)

    return decorate


def command(main: Main) -> Main:
    """Decorate a `main(argv) -> exit status`, so that what a user can mend ends with one text and exit status 2.

    That is a `UserError`, an `OSError` (a full disk, a missing right, a folder in place of a file) and text that is not
    UTF-8. Where all ranks raise the same together, rank 0 speaks for them; any other such error is told by its rank,
    with the rank's number and host, to standard error and to torchrun. Ctrl-C ends with status 130. A collective that
    fails because another rank is gone is explained, and ends with status 69. Any other exception is a bug and keeps its
    traceback. The process group is left on the way out.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            status = main(argv)
            sys.stdout.flush()  # the disk behind it may be full
            return status
        except (UserError, OSError, UnicodeDecodeError) as error:
            rank, text = os.environ.get("RANK", "0"), in_words(error)
            together = isinstance(error, UserError) and error.on_all_ranks
            if not together:
                distributed.report_failure(error)
                if os.environ.get("WORLD_SIZE", "1") != "1":
                    text = f"rank {rank} on {socket.gethostname()}: {text}"
            if not together or rank == "0":
                print(f"error: {printable_lines(text)}", file=sys.stderr, flush=True)
            try:
                sys.stdout.flush()
            except OSError:  # else Python would try again at its end, and print a traceback of its own
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def in_words(error: Exception) -> str:
    """What went wrong, with which file, and what to do."""
    if isinstance(error, UnicodeDecodeError):
        return f"a file that begins with {error.object[:40]!r} is no UTF-8 text ({error.reason}); store it as UTF-8"
    if isinstance(error, OSError):
        file = os.fsdecode(error.filename or "a file or the output")
        return f"{file}: {error.strerror or error}; {_REMEDIES.get(error.errno or 0, 'see that it may be used')}"
    return str(error)
