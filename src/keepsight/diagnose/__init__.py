"""Does a VLM lose its image while it writes, and is its memory really used?

`AttentionMeter`, `logit_lens` and `RetrievalMeter` are instruments to use by themselves; `examine` is the whole
diagnosis, as `keepsight diagnose` makes it.
"""

from typing import Any

#: Public name -> the module it is in. They are imported when first used: the settings alone need no torch.
_PUBLIC = {
    "AttentionMeter": "instruments.attention",
    "AttentionTrace": "instruments.attention_trace",
    "Battery": "battery.causal",
    "Case": "cases",
    "CausalResult": "battery.verdict",
    "DecayFit": "instruments.decay",
    "Diagnosis": "results",
    "FormingTrace": "instruments.forming",
    "InvocationCount": "battery.invocations",
    "InvocationResult": "battery.invocation_results",
    "KnownTask": "task",
    "LONG_PROMPT": "cases",
    "LatentProbe": "battery.probe_results",
    "LengthResult": "battery.lengths",
    "LengthScore": "battery.lengths",
    "LensTrace": "instruments.lens",
    "Memory": "memories.interface",
    "Output": "reader",
    "Probe": "battery.probe",
    "Reader": "reader",
    "RetrievalMeter": "instruments.retrieval",
    "RetrievalTrace": "instruments.retrieval",
    "Sample": "cases",
    "Settings": "settings",
    "Verdict": "battery.verdict",
    "VisMemHandle": "memories.vismem",
    "Written": "results",
    "examine": "run",
    "fit_decay": "instruments.decay",
    "fit_trace": "instruments.decay",
    "logit_lens": "instruments.lens",
    "memory_of": "memories.find",
    "read_dataset": "cases",
    "read_results": "results",
    "watch_forming": "instruments.forming",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(f"keepsight.diagnose.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'keepsight.diagnose' has no attribute {name!r}")
