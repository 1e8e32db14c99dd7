"""The one error type for what a user can mend. Imports nothing, so that every layer can raise it."""


class UserError(Exception):
    """Wrong input, configuration or environment: the text says what, where, and what to do.

    The commands print it without a traceback and end with exit status 2. `on_all_ranks` marks an error that every rank
    raises alike, so that one of them shows it for all.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks
