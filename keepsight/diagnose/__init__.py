"""Does a VLM lose its image while it writes, and is its memory really used?

`AttentionMeter`, `logit_lens` and `RetrievalMeter` are instruments to use by themselves; `examine` is the whole
diagnosis, as `keepsight diagnose` makes it.
"""

from keepsight.diagnose.attention import AttentionMeter
from keepsight.diagnose.attention_trace import AttentionTrace
from keepsight.diagnose.cases import LONG_PROMPT, Case, Sample, lab_cases, read_dataset
from keepsight.diagnose.causal import Battery
from keepsight.diagnose.decay import DecayFit, fit_decay, fit_trace
from keepsight.diagnose.forming import FormingTrace, watch_forming
from keepsight.diagnose.invocations import InvocationCount, InvocationResult
from keepsight.diagnose.latents import VisMemHandle
from keepsight.diagnose.lengths import LengthResult, LengthScore
from keepsight.diagnose.lens import LensTrace, logit_lens
from keepsight.diagnose.memories import Memory, memory_of
from keepsight.diagnose.probe import Probe
from keepsight.diagnose.probe_results import LatentProbe
from keepsight.diagnose.reader import Output, Reader
from keepsight.diagnose.results import Diagnosis, Written, read_results
from keepsight.diagnose.retrieval import RetrievalMeter, RetrievalTrace
from keepsight.diagnose.run import examine
from keepsight.diagnose.settings import Settings
from keepsight.diagnose.verdict import CausalResult, Verdict

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
    "lab_cases",
    "logit_lens",
    "memory_of",
    "read_dataset",
    "read_results",
    "watch_forming",
]
