"""The one error type for what a user can mend, and text that is safe to show. Imports nothing: for every layer."""


class UserError(Exception):
    """Wrong input, configuration or environment: the text says what, where, and what to do.

    The commands print it without a traceback and end with exit status 2. `on_all_ranks` marks an error that every rank
    raises alike, so that one of them shows it for all.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


def printable(text: str) -> str:
    r"""`text` for a terminal: what cannot be printed (control characters, bytes of no encoding) as \x1b and the like.

    Names from data go through here before they are shown, so that none of them moves the cursor or forges a line.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """`printable` of a text whose line ends are its own; all lines but the first are indented."""
    return "\n  ".join(printable(line).strip() for line in text.split("\n"))
