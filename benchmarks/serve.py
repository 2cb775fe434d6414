"""What serving costs: `keepsight serve`, with a memory and without, against transformers' own server and `generate`.

    python benchmarks/serve.py                      # a 12M-parameter VLM with random weights, on any machine
    python benchmarks/serve.py --model Qwen/Qwen3-VL-8B-Instruct --adapter MEMORY    # needs a GPU
    python benchmarks/serve.py --quick              # does it run? Nothing to quote

Variants, in turn, in an order that rotates from round to round, each with 1, 4 and 8 clients at a time who send one
request after the other (an image, a line of text; a fixed number of tokens, greedy):

    generate        `model.generate`, in this process, one request at a time: no server at all
    generate+pvm    the same with a memory
    transformers    `transformers serve` (one VLM request at a time; its continuous batching takes no images)
    keepsight       `keepsight serve` on the same model, without memory
    keepsight+pvm   the same with a memory

All servers are up all the time; only one is asked. Every answer must have the full length, or the run stops. vLLM is
measured by serve_vllm.py. The server's (or this process's) processor time is taken too: on a machine that others use it
is what can be compared. Raw times go to benchmarks/results/serve/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import get_peft_model
from rich.table import Table
from shared.measuring import conditions, make_console, spread
from shared.serving import Server, generated_ids, messages
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import keepsight
from keepsight.lab.samples import example_images
from keepsight.shipped import resolve_base

RESULTS = Path(__file__).parent / "results" / "serve"
MEASURED = (
    "src/keepsight/serve",
    "src/keepsight/pvm",
    ":!src/keepsight/serve/vllm*",
    "benchmarks/serve.py",
    "benchmarks/shared/serving.py",
)


def make_model(folder: Path, width: int, layers: int) -> str:
    """A VLM of the reference's architecture with random weights, which never writes an end token."""
    config = AutoConfig.from_pretrained(resolve_base("keepsight/reference"))
    text = config.text_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = width, layers, 3 * width
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = width // 64, width // 128, 64
    text.rope_parameters = dict(text.rope_parameters, mrope_section=[16, 8, 8])
    text.eos_token_id = config.eos_token_id = None
    config.vision_config.out_hidden_size = width
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(resolve_base("keepsight/reference")).save_pretrained(folder)
    return str(folder)


def make_memory(base: str, folder: Path) -> str:
    """A PVM with random weights and open gates on a model."""
    model, _ = keepsight.load(base)
    torch.manual_seed(0)
    model = get_peft_model(model, keepsight.PvmConfig(init_gate=0.1))
    model.save_pretrained(folder)
    return str(folder)


class OverHttp:
    """A server, as its clients see it.

    Args:
        server: the process.
        model: what it calls its model.
    """

    def __init__(self, server: Server, model: str):
        self.server, self.model = server, model
        self.client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=64))

    def cpu_seconds(self) -> float:
        """What the server has computed so far."""
        fields = Path(f"/proc/{self.server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, content: Any, image: Any, tokens: int) -> int:
        """Tokens of one answer."""
        body = {"model": self.model, "messages": content, "max_tokens": tokens, "temperature": 0}
        response = self.client.post(f"{self.server.url}/v1/chat/completions", json=body)
        response.raise_for_status()
        return response.json()["usage"]["completion_tokens"]


class InProcess:
    """`generate`, one request at a time.

    Args:
        model: a model.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    @property
    def parameters(self) -> dict[str, int]:
        """How many the base has, and how many its memory."""
        counts = {"base": 0, "memory": 0}
        for name, parameter in self.model.named_parameters():
            counts["memory" if "pvm_blocks" in name else "base"] += parameter.numel()
        return counts

    def cpu_seconds(self) -> float:
        """What this process has computed so far."""
        return time.process_time()

    def ask(self, content: Any, image: Any, tokens: int) -> int:
        """Tokens of one answer."""
        return len(generated_ids(self.model, self.processor, image, tokens))


def load(variant: Any, images: list[Any], bodies: list[Any], clients: int, tokens: int) -> dict[str, Any]:
    """All requests, by so many clients at a time: seconds for all, by the clock and of the processor, and of each."""

    def one(index: int) -> float:
        started = time.perf_counter()
        written = variant.ask(bodies[index], images[index], tokens)
        assert written == tokens, f"{written} tokens instead of {tokens}"
        return time.perf_counter() - started

    started, computed = time.perf_counter(), variant.cpu_seconds()
    with ThreadPoolExecutor(clients) as pool:
        seconds = list(pool.map(one, range(len(images))))
    computed = variant.cpu_seconds() - computed
    return {"seconds": time.perf_counter() - started, "cpu_seconds": computed, "each": seconds}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All variants; see the module."""
    base = arguments.model or make_model(folder / "model", arguments.width, arguments.layers)
    memory = arguments.adapter or make_memory(base, folder / "memory")
    images = [image for image, _ in example_images(arguments.requests, seed=3)]
    bodies = [messages(image) for image in images]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--max-batch", str(max(arguments.clients)), "--max-prompt-tokens", "8000"]
    remembering = InProcess(*keepsight.load(memory, base=base))
    variants: dict[str, Any] = {"generate": InProcess(*keepsight.load(base)), "generate+pvm": remembering}
    if "transformers" in arguments.variants:
        words = ["transformers.cli.transformers", "serve", base, "--port", str(port), "--host", "127.0.0.1"]
        server = Server(words, url=f"http://127.0.0.1:{port}", healthy="/health")
        variants["transformers"] = OverHttp(server, base)
    variants["keepsight"] = OverHttp(Server.keepsight([base, "--name", "m", *flags]), "m")
    variants["keepsight+pvm"] = OverHttp(Server.keepsight([memory, "--base", base, "--name", "m", *flags]), "m")
    variants = {name: variant for name, variant in variants.items() if name in arguments.variants}
    samples: dict[str, dict[str, list[Any]]] = {name: {str(c): [] for c in arguments.clients} for name in variants}
    try:
        for name, variant in variants.items():
            load(variant, images[:2], bodies[:2], 1, 4)  # warm
            print(f"{name} is ready", file=sys.stderr)
        names = list(variants)
        for round_ in range(arguments.rounds):
            for clients in arguments.clients:
                for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                    if name.startswith("generate") and clients > 1:
                        continue  # one request at a time is all it does
                    found = load(variants[name], images, bodies, clients, arguments.tokens)
                    samples[name][str(clients)].append(found)
    finally:
        for variant in variants.values():
            if isinstance(variant, OverHttp):
                variant.server.process.kill()
    return {
        "parameters": remembering.parameters["base"],
        "parameters_of_memory": remembering.parameters["memory"],
        "samples": samples,
        "summary": summarize(samples, arguments.requests * arguments.tokens, arguments.tokens),
    }


def summarize(samples: dict[str, dict[str, list[Any]]], total: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of all clients together, and milliseconds per token of one and of the processor."""
    summary: dict[str, Any] = {}
    for name, by_clients in samples.items():
        for clients, rounds in by_clients.items():
            if rounds:
                each = [1000 * seconds / tokens for round_ in rounds for seconds in round_["each"]]
                summary.setdefault(name, {})[clients] = {
                    "tokens_per_second": spread([total / round_["seconds"] for round_ in rounds]),
                    "ms_per_token": spread(each),
                }
                computed = [1000 * round_["cpu_seconds"] / total for round_ in rounds if "cpu_seconds" in round_]
                if computed:
                    summary[name][clients]["cpu_ms_per_token"] = spread(computed)
    return summary


def show(result: dict[str, Any]) -> None:
    """Print a result as a table."""
    table = Table(title=f"{result['result']['parameters'] / 1e6:.1f}M parameters, {result['conditions']['device']}")
    columns = (
        "tokens / s [quartiles]",
        "ms per token of one client [quartiles]",
        "processor, ms per token [quartiles]",
    )
    for name in ("variant", "clients", *columns):
        table.add_column(name)
    for name, by_clients in result["result"]["summary"].items():
        for clients, found in by_clients.items():
            cells = [
                f"{found[key]['median']:.1f} [{found[key]['q1']:.1f}, {found[key]['q3']:.1f}]"
                for key in ("tokens_per_second", "ms_per_token", "cpu_ms_per_token")
                if key in found
            ]
            table.add_row(name, clients, *cells)
    make_console().print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id; default: random weights")
    parser.add_argument("--adapter", help="a PVM for it; default: random weights")
    parser.add_argument("--width", type=int, default=384, help="of the random model")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    names = ["generate", "generate+pvm", "transformers", "keepsight", "keepsight+pvm"]
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--name")
    parser.add_argument("--note", default="")
    parser.add_argument("--quick", action="store_true", help="does it run? Nothing to quote")
    parser.add_argument("--show", nargs="+", type=Path, help="print the tables of result files")
    arguments = parser.parse_args(argv)
    if arguments.show:
        for path in arguments.show:
            show(json.loads(path.read_text()))
        return
    if arguments.quick:
        arguments.clients, arguments.requests, arguments.tokens, arguments.rounds = [1, 2], 4, 8, 1
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = sys.argv[1:] if argv is None else argv
    found = conditions("benchmarks/serve.py", given, MEASURED, device, arguments.note)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(arguments, Path(folder))
    options = {k: v for k, v in vars(arguments).items() if k not in ("show", "name")}
    result = {"conditions": found, "arguments": options, "result": measured}
    show(result)
    if not arguments.quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"{arguments.name or f'{device.type}-serve'}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
