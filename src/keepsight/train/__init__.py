"""Teaching a memory: data, supervised fine-tuning, reinforcement, controls, the blindfold warm-up, what runs cost."""

from typing import Any

#: Public name -> the module it is in. They are imported when first used: training needs an extra, keepsight does not.
_PUBLIC = {
    "FormationSettings": "vismem.train",
    "GrpoSettings": "pvm.grpo",
    "InvocationSettings": "vismem.train",
    "SftSettings": "pvm.sft",
    "train_pvm": "pvm.sft",
    "train_pvm_grpo": "pvm.grpo",
    "train_vismem_formation": "vismem.train",
    "train_vismem_invocation": "vismem.train",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(f"keepsight.train.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'keepsight.train' has no attribute {name!r}")
