"""`keepsight chat`: a page to try a model on, memory on and off side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from keepsight.cli.common.console import quiet, say, with_examples
from keepsight.cli.common.model import Adapters, Base, Device, Dtype
from keepsight.errors import KeepsightError
from keepsight.shipped import PVM_NAME, VISMEM_NAME


@with_examples(
    ("the two small memories that are built in; then open http://127.0.0.1:8000/chat", "keepsight chat"),
    ("a memory (its base is found by itself)", "keepsight chat my-memory"),
    ("a server that runs, here or elsewhere", "keepsight chat http://192.168.1.7:8000"),
    ("the same page on a server for others", "KEEPSIGHT_API_KEY=... keepsight serve my-memory --chat --host 0.0.0.0"),
)
def chat(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="A memory or a VLM, a folder or a hub id; or the address of a server that runs.")
    ] = PVM_NAME,
    adapter: Adapters = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port to listen on; 0 takes a free one. Default: 8000; for an address, a free one.", max=65535
        ),
    ] = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="KEEPSIGHT_API_KEY", help="With an address: the key that the server wants.")
    ] = None,
) -> None:
    """Try a model on a page: drop an image, ask, and compare the answers with the memory and without.

    Point at a word to see where the model and its memory looked when it was written. The page is served on this machine
    only, by the server of `keepsight serve`, and loads nothing from anywhere.
    """
    if source.startswith(("http://", "https://")):
        given = {
            "--adapter": adapter,
            "--base": base,
            "--device": device,
            "--dtype": dtype if dtype != "auto" else None,
        }
        unused = [name for name, value in given.items() if value]
        if unused:
            raise KeepsightError(f"{unused[0]}: {source} has its model loaded already; leave {unused[0]} out.")
        return _chat_with(context, source, api_key, port or 0)

    asked = context.get_parameter_source("api_key")
    if api_key and asked is not None and asked.name == "COMMANDLINE":  # in the environment it may be for something else
        raise KeepsightError(
            "--api-key is for an address. A page behind a key: keepsight serve MODEL --chat --api-key ..."
        )

    from keepsight.cli.serve import serve

    others = [f"{VISMEM_NAME}={VISMEM_NAME}"] if source == PVM_NAME and not adapter and base is None else None
    port = 8000 if port is None else port
    serve(context, source, adapter=adapter, model=others, port=port, base=base, dtype=dtype, device=device, chat=True)


def _chat_with(context: typer.Context, address: str, key: str | None, port: int) -> None:
    """The page alone, for a server that runs."""
    from keepsight.serve.openai.chat.remote import Remote, remote_page
    from keepsight.serve.openai.server import address_of, bind, run

    quiet()
    remote = Remote(address, key)
    names = ", ".join(remote.check())
    taken = bind("127.0.0.1", port)

    def ready() -> None:
        if context.obj is not None:
            context.obj.end()
        say(f"[{names} on {remote.address}: a page to try it on: http://{address_of(taken)}/chat]")

    run(remote_page(remote), taken, 5.0, ready)
    say("[finished]")
