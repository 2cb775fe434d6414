"""What is raised for training data that cannot be used."""

from __future__ import annotations

from keepsight.errors import KeepsightError


class DataError(KeepsightError):
    """The training data cannot be used as they are.

    Args:
        message: what is wrong.
        hint: what to do about it, said once however many samples have the same problem.

    Attributes:
        format: the name of the row's format, where it was recognised.
    """

    format = ""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint
