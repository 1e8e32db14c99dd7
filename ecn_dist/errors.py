"""The one error type for what a user can mend. Imports nothing, so that every layer can raise it."""


class UserError(Exception):
    """Wrong input, configuration or environment: the text says what, where, and what to do.

    The commands print it without a traceback, on rank 0 only, and end with exit status 2.
    """
