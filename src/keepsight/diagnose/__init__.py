"""Does a VLM lose its image while it writes, and is its memory really used?

`AttentionMeter`, `logit_lens` and `RetrievalMeter` are instruments to use by themselves; `examine` is the whole
diagnosis, as `keepsight diagnose` makes it.
"""

from keepsight.diagnose.battery.causal import Battery
from keepsight.diagnose.battery.invocation_results import InvocationResult
from keepsight.diagnose.battery.invocations import InvocationCount
from keepsight.diagnose.battery.lengths import LengthResult, LengthScore
from keepsight.diagnose.battery.probe import Probe
from keepsight.diagnose.battery.probe_results import LatentProbe
from keepsight.diagnose.battery.verdict import CausalResult, Verdict
from keepsight.diagnose.cases import LONG_PROMPT, Case, Sample, read_dataset
from keepsight.diagnose.instruments.attention import AttentionMeter
from keepsight.diagnose.instruments.attention_trace import AttentionTrace
from keepsight.diagnose.instruments.decay import DecayFit, fit_decay, fit_trace
from keepsight.diagnose.instruments.forming import FormingTrace, watch_forming
from keepsight.diagnose.instruments.lens import LensTrace, logit_lens
from keepsight.diagnose.instruments.retrieval import RetrievalMeter, RetrievalTrace
from keepsight.diagnose.memories.find import memory_of
from keepsight.diagnose.memories.interface import Memory
from keepsight.diagnose.memories.vismem import VisMemHandle
from keepsight.diagnose.reader import Output, Reader
from keepsight.diagnose.results import Diagnosis, Written, read_results
from keepsight.diagnose.run import examine
from keepsight.diagnose.settings import Settings
from keepsight.diagnose.task import KnownTask

__all__ = [
    "LONG_PROMPT",
    "AttentionMeter",
    "AttentionTrace",
    "Battery",
    "Case",
    "CausalResult",
    "DecayFit",
    "Diagnosis",
    "FormingTrace",
    "InvocationCount",
    "InvocationResult",
    "KnownTask",
    "LatentProbe",
    "LengthResult",
    "LengthScore",
    "LensTrace",
    "Memory",
    "Output",
    "Probe",
    "Reader",
    "RetrievalMeter",
    "RetrievalTrace",
    "Sample",
    "Settings",
    "Verdict",
    "VisMemHandle",
    "Written",
    "examine",
    "fit_decay",
    "fit_trace",
    "logit_lens",
    "memory_of",
    "read_dataset",
    "read_results",
    "watch_forming",
]
