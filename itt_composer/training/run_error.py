"""What stops a run before its end, or before its start, with one line for its user."""

from __future__ import annotations


class RunError(ValueError):
    """A run that does not start, or ends early. The message is one line.

    Args:
        message: what is wrong, and what to do.
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class NotFiniteError(RunError):
    """A training whose loss or weights are no longer finite."""
