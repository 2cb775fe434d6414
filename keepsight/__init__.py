"""keepsight: memory for what a vision-language model sees."""

from keepsight.pvm import PvmConfig

__all__ = ["PvmConfig"]
__version__ = "0.1.0"
