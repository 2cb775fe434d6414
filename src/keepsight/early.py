"""What has to be so before PEFT is imported, which imports bitsandbytes wherever that is installed.

On CPUs with AVX-512 bitsandbytes warns, whenever it is imported, that an optional kernel of another package is missing.
A command's error output is for what the user can act on.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
