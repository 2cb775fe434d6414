"""keepsight as a model of lmms-eval, registered by an entry point: no fork, no file to copy.

    lmms_eval --model keepsight --model_args pretrained=my-memory,memory=on --tasks mmstar --batch_size 8

`manifest` is what lmms-eval finds; the model itself is in `lmms_model.py`, which needs lmms-eval.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry asks for (entry point group `lmms_eval.models`)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("keepsight", chat_class_path="keepsight.evaluate.lmms_model.KeepsightModel")
