"""The options that say which model a command works on: generate, diagnose and serve share them."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from keepsight.checkpoints.attention import Attention as Kernel

BUILT_IN = "keepsight/reference"

Source = Annotated[
    str, typer.Argument(help="An adapter (its base is found by itself) or a plain VLM: a folder or a hub id.")
]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", "-a", help="A further adapter, memory or LoRA; repeat for several.")
]
Images = Annotated[list[str] | None, typer.Option("--image", "-i", help="An image file; repeat for several.")]
Base = Annotated[str | None, typer.Option(help="The base model, where it is not the one the adapter recorded.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the weights were saved.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the GPU if there is one.")]
Attention = Annotated[Kernel | None, typer.Option(help="Attention kernel. Default: transformers' choice, sdpa.")]
