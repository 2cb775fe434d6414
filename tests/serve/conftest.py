"""Models and servers that tests of serving share."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import attach
from live import Live, serving

import keepsight


@pytest.fixture(scope="session")
def remembering() -> tuple[Any, Any]:
    """The reference VLM with a PVM that matters, and its processor."""
    model, processor = keepsight.load("keepsight/reference")
    return attach(model, width=32, gate=0.3), processor


@pytest.fixture(scope="session")
def server(remembering: tuple[Any, Any]) -> Iterator[Live]:
    """A server with the default limits."""
    with serving(*remembering) as live:
        yield live


@pytest.fixture(scope="session")
def latent() -> tuple[Any, Any]:
    """The reference VLM with a VisMem that it invokes now and then."""
    import sys
    from pathlib import Path

    from keepsight.vismem import VisMemBranch, add_memory_tokens

    sys.path.insert(0, str(Path(__file__).parent.parent / "vismem"))
    from vismem_helpers import attach as attach_latent

    model, processor = keepsight.load("keepsight/reference")
    model = attach_latent(model, max_invocations=3, max_text_states=4, policy="free")
    add_memory_tokens(processor, model)
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.fill_(9.0)
    return model, processor
