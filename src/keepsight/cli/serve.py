"""`keepsight serve`: a model with its memory behind OpenAI's API."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keepsight.cli.common.console import check_device, quiet, refuse_twins, say, with_examples
from keepsight.cli.common.model import BUILT_IN, Adapters, Attention, Base, Device, Dtype, Source
from keepsight.cli.common.progress import Waiting
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.serve.openai.settings import MB, Limits, ServeSettings

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_FAR = 2000  # words between an image and a question about it, on the page


@with_examples(
    ("the tiny model that is built in", "keepsight serve"),
    ("a memory (its base is found by itself), for this machine only", "keepsight serve my-memory"),
    (
        "for others too: behind a key, taken from the environment",
        "KEEPSIGHT_API_KEY=... keepsight serve my-memory --host 0.0.0.0",
    ),
    (
        "images from a folder and from one web site as well",
        "keepsight serve my-memory --allow-local-dir photos --allow-remote-host images.example.com",
    ),
)
def serve(
    context: typer.Context,
    source: Source = BUILT_IN,
    adapter: Adapters = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ADAPTER[+ADAPTER]",
            help="One more model on the same base, for requests that name it; repeat for several.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: folder or hub id.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="KEEPSIGHT_API_KEY",
            show_envvar=True,
            help="What clients must send as their key. Better in the environment: arguments can be seen by others.",
        ),
    ] = None,
    allow_local_dir: Annotated[
        list[Path] | None, typer.Option(help="A folder that clients may name images in; repeat for several.")
    ] = None,
    allow_remote_host: Annotated[
        list[str] | None,
        typer.Option(help="A host to fetch images from, .example.com for all below it; repeat for several."),
    ] = None,
    trusted_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name to answer under (Host header), beside localhost; repeat for several. Default: localhost, "
            "where only that is listened on; else any."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Offer a page to try the model on, at /chat.")] = False,
    max_batch: Annotated[
        int, typer.Option(help="Answers that are written at the same time.", min=1)
    ] = Limits.max_batch,
    max_queue: Annotated[int, typer.Option(help="Requests that wait; further ones get 429.", min=0)] = Limits.max_queue,
    max_output_tokens: Annotated[
        int, typer.Option(help="Length limit of an answer, and its default.", min=1)
    ] = Limits.max_output_tokens,
    max_prompt_tokens: Annotated[
        int, typer.Option(help="Length limit of a prompt, images included.", min=1)
    ] = Limits.max_prompt_tokens,
    max_images: Annotated[int, typer.Option(help="Images per request.", min=1)] = Limits.max_images,
    max_image_mb: Annotated[
        float, typer.Option(help="Size of one image file, in MB.", min=0.001)
    ] = Limits.max_image_bytes // MB,
    max_image_megapixels: Annotated[
        float, typer.Option(help="Size of one image, in million pixels.", min=0.001, max=89)
    ] = Limits.max_image_pixels // MB,
    max_body_mb: Annotated[
        float,
        typer.Option(help="Size of a request, in MB.", min=0.001),
    ] = Limits.max_body_bytes // MB,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests get to finish at the end.", min=1)
    ] = 120,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    attention: Attention = None,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="What writes. vllm: an experiment, for a VisMem; it needs keepsight[vllm]."),
    ] = "transformers",
    engine_args: Annotated[
        str | None,
        typer.Option(help="With --engine vllm: arguments for vLLM, as JSON: '{\"gpu_memory_utilization\": 0.6}'."),
    ] = None,
) -> None:
    """Serve a model with its memory behind OpenAI's API. It answers /v1/chat/completions, with images and streaming.

    Any OpenAI client works: base_url="http://127.0.0.1:8000/v1". Ctrl-C, or SIGTERM, finishes what runs and ends.
    """
    from keepsight.serve.openai.server import address_of, bind, log_to_stderr, run

    quiet()
    check_device(device)
    missing = [folder for folder in allow_local_dir or () if not folder.is_dir()]
    if missing:
        raise KeepsightError(f"--allow-local-dir {missing[0]}: no such folder.")
    wrong = [h for h in allow_remote_host or () if "/" in h or "*" in h or not h.strip(".")]
    if wrong:
        raise KeepsightError(
            f"--allow-remote-host {wrong[0]}: expected a host such as images.example.com, or .example.com for all "
            "below it; no scheme, no path, no *."
        )
    if api_key is not None and not api_key.strip():
        raise KeepsightError("--api-key is empty; leave it out, or choose one.")
    is_local = host in ("127.0.0.1", "localhost", "::1")
    wrong = [h for h in trusted_host or () if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", h)]
    if wrong:
        raise KeepsightError(
            f"--trusted-host {wrong[0]}: expected a name such as models.example.com; no scheme, no port."
        )
    trusted = tuple(h.lower() for h in trusted_host or ())
    trusted = (*trusted, *_LOOPBACK) if trusted or is_local else ()

    from keepsight.checkpoints.load import load_several
    from keepsight.checkpoints.sources import check_sources
    from keepsight.data.collate import require_chat_template

    base_name, infos = check_sources(source, adapter or [], base)
    refuse_twins(infos, "Offer each under a name of its own: --model NAME=ADAPTER.")
    options = _engine_args(engine, engine_args, infos)
    settings = ServeSettings(
        name=name or _name(source),
        limits=Limits(
            max_batch=max_batch,
            max_queue=max_queue,
            max_output_tokens=max_output_tokens,
            max_prompt_tokens=max_prompt_tokens,
            max_images=max_images,
            max_image_bytes=round(max_image_mb * MB),
            max_image_pixels=round(max_image_megapixels * MB),
            max_body_bytes=round(max_body_mb * MB),
        ),
        api_key=api_key,
        local_folders=tuple(folder.resolve() for folder in allow_local_dir or ()),
        remote_hosts=tuple(allow_remote_host or ()),
        trusted_hosts=trusted,
        chat=chat,
        far_reading=_far_reading,
    )
    sets = {settings.name: infos} | _further(model or [], base_name, settings.name)
    if engine == "vllm" and chat:
        raise KeepsightError("--chat shows where the model looked, which needs --engine transformers.")
    if engine == "vllm" and len(sets) > 1:
        raise KeepsightError("--engine vllm serves one model; leave --model out, or leave --engine out.")
    if not is_local and api_key is None:
        warnings.warn(
            f"Anybody who reaches {host} can use this server. Set KEEPSIGHT_API_KEY, or leave --host out.",
            KeepsightWarning,
            stacklevel=2,
        )
    taken = bind(host, port)
    with Waiting(f"loading {base_name}"):
        loaded = load_several(base_name, sets, dtype=dtype, device=device, attn_implementation=attention)
    for _, processor in loaded.values():
        require_chat_template(processor)
    log_to_stderr()
    api = _api(loaded, sets, settings)
    if engine == "vllm":
        with Waiting("starting vLLM"):
            api = _with_vllm(api, base_name, infos[0], options)
    memories = ", ".join(api.served.memories) or "none"
    others = "".join(f"; also {name}" for name in sets if name != settings.name)

    def ready() -> None:
        if context.obj is not None:  # from here on it waits for others, and may be silent
            context.obj.end()
        say(
            f"[serving {settings.name} on http://{address_of(taken)}/v1; memory: {memories}{others}; process "
            f"{os.getpid()}]"
        )
        if chat:
            say(f"[a page to try it on: http://{address_of(taken)}/chat]")

    run(api.app(), taken, shutdown_timeout, ready)
    say("[finished]")


def _far_reading(processor: Any) -> Any:
    """For the page: what the lab knows to ask of its own models."""
    from keepsight.lab.cases import DigitGrids
    from keepsight.lab.samples import far_reading
    from keepsight.serve.openai.settings import FarReading

    return None if DigitGrids.of(processor) is None else FarReading(**far_reading(_FAR))


def _further(models: list[str], base_name: str, first: str) -> dict[str, list[Any]]:
    """Name -> the adapters of every further model, checked."""
    from keepsight.checkpoints.sources import check_sources

    found: dict[str, list[Any]] = {}
    for given in models:
        name, _, adapters = given.partition("=")
        if not name or not all(adapters.split("+")):
            raise KeepsightError(f"--model {given}: expected NAME=ADAPTER, as reader=my-memory, or NAME=MEMORY+LORA.")
        if name == first or name in found:
            raise KeepsightError(f"--model {given}: there is a model {name!r} already; choose another name.")
        _, found[name] = check_sources(base_name, adapters.split("+"))
        refuse_twins(found[name], "Offer each under a name of its own: --model NAME=ADAPTER.")
    return found


def _api(loaded: dict[str, tuple[Any, Any]], sets: dict[str, list[Any]], settings: Any) -> Any:
    from keepsight.serve.hf.latent import LatentMemories
    from keepsight.serve.hf.served import Served
    from keepsight.serve.openai.api import Api
    from keepsight.vismem.writing.checks import warn

    served = {}
    for name, (model, processor) in loaded.items():
        latent = LatentMemories.of(model)
        if latent is not None:
            warn(latent.writer.branch, latent.policy)  # of memories that were never trained
        adapters = tuple((_adapter_name(info.path), info.method) for info in sets[name])
        served[name] = Served.of(model, processor, adapters)
    return Api(served.pop(settings.name), settings, others=served)


def _engine_args(engine: str, given: str | None, infos: list[Any]) -> dict[str, Any]:
    """Check what vLLM is asked for, before anything is loaded."""
    if engine != "vllm":
        if given is not None:
            warnings.warn(
                "--engine-args has no effect without --engine vllm, and was ignored.", KeepsightWarning, stacklevel=3
            )
        return {}
    from keepsight.serve.vllm.check import check_version

    check_version()
    if [info.method for info in infos] != ["VISMEM"]:
        found = ", ".join(info.method for info in infos) or "a plain model"
        raise KeepsightError(
            f"--engine vllm serves one VisMem and nothing beside it; given: {found}. For a PVM: keepsight export vllm "
            "ADAPTER OUT, then vllm serve OUT. Everything else: without --engine vllm."
        )
    try:
        options = json.loads(given or "{}")
    except json.JSONDecodeError as error:
        raise KeepsightError(f"--engine-args {given!r} is no JSON: {error}.") from None
    if not isinstance(options, dict):
        raise KeepsightError(f'--engine-args {given!r}: expected an object, as {{"gpu_memory_utilization": 0.6}}.')
    warnings.warn(
        "--engine vllm is an experiment: the model is loaded twice, and every answer with a memory is read twice. What "
        "it costs stands in docs/serve-vllm.md.",
        KeepsightWarning,
        stacklevel=3,
    )
    return options


def _with_vllm(api: Any, base: str, vismem: Any, options: dict[str, Any]) -> Any:
    from keepsight.serve.openai.api import Api
    from keepsight.serve.vllm.engine import VllmEngine

    served, limits = api.served, api.settings.limits
    most = limits.max_prompt_tokens + limits.max_output_tokens
    most = most if served.context is None else min(most, served.context)
    made = VllmEngine(base, vismem, served.model, served.tokenizer, limits.max_batch, most, **options)
    return Api(served, api.settings, made)


def _name(source: str) -> str:
    """A folder's own name; a hub id as it is."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def _adapter_name(path: Path) -> str:
    """A folder's own name; a hub id of what lies in the hub's cache."""
    cached = [part.removeprefix("models--").replace("--", "/") for part in path.parts if part.startswith("models--")]
    return cached[-1] if cached else path.resolve().name
