"""The one error that users see as a line instead of a traceback."""


class UserError(ValueError):
    """Something the user can mend. The message is one line: what, where, how to mend it."""
