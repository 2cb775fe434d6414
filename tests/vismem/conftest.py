"""The fixture `name`: the families that VisMem is tested on."""

from vismem_helpers import name  # noqa: F401
