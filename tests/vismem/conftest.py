"""The fixtures `name` and `any_name`: the families that VisMem is tested on, in full and in what is essential."""

from vismem_helpers import any_name, name  # noqa: F401
