"""keepsight: memory for what a vision-language model sees."""

from keepsight.loading import load
from keepsight.pvm import PvmConfig

__all__ = ["PvmConfig", "load"]
__version__ = "0.1.0"
