"""`keepsight chat`: a page to try a model on, memory on and off side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from keepsight.cli.common.console import with_examples
from keepsight.cli.common.model import Adapters, Base, Device, Dtype, Source
from keepsight.shipped import PVM_NAME, VISMEM_NAME


@with_examples(
    ("the two small memories that are built in; then open http://127.0.0.1:8000/chat", "keepsight chat"),
    ("a memory (its base is found by itself)", "keepsight chat my-memory"),
    ("the same page on a server for others", "KEEPSIGHT_API_KEY=... keepsight serve my-memory --chat --host 0.0.0.0"),
)
def chat(
    context: typer.Context,
    source: Source = PVM_NAME,
    adapter: Adapters = None,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Try a model on a page: drop an image, ask, and compare the answers with the memory and without.

    Point at a word to see where the model and its memory looked when it was written. The page is served on this machine
    only, by the server of `keepsight serve`, and loads nothing from anywhere.
    """
    from keepsight.cli.serve import serve

    others = [f"{VISMEM_NAME}={VISMEM_NAME}"] if source == PVM_NAME and not adapter and base is None else None
    serve(context, source, adapter=adapter, model=others, port=port, base=base, dtype=dtype, device=device, chat=True)
