"""The errors users meet most often, each a short lesson: what was found, what was expected, what to write instead."""


class KeepsightError(ValueError):
    """Base class of the errors that keepsight raises for something the user can mend."""


class UnsupportedModelError(KeepsightError):
    """The model belongs to no family that keepsight knows."""


class AdapterMismatchError(KeepsightError):
    """An adapter was made for another base model than the one it is put on."""


class BrokenAdapterError(KeepsightError):
    """The files of an adapter are missing, truncated or hold values that no training run should produce."""


class MergeError(KeepsightError):
    """A visual memory was asked to merge into the base weights, which is impossible."""


class KeepsightWarning(UserWarning):
    """Something the user configured has no effect."""
