"""Figures of what a memory costs, from the committed raw results of the benchmarks (see figures.py)."""

from __future__ import annotations

from figure_values import BENCHMARKS, raw, spread, table, thousands

# Costs (benchmarks/)


def decode_table() -> str:
    """Time per decoded token."""
    rows = []
    for name in ("cpu-1b-bfloat16-eager", "cpu-tiny-float32-eager", "cpu-tiny-float32-compiled"):
        file = raw(BENCHMARKS / "decode" / f"{name}.json")
        settings = file["settings"]
        label = f"{settings['shape']}, {settings['dtype']}, {'eager' if settings['mode'] == 'eager' else 'compiled'}"
        for result in file["results"]:
            ratio, ms = result["summary"]["ratio_to_base"], result["summary"]["ms_per_token"]
            rows.append(
                [
                    label,
                    thousands(result["visual_tokens"]),
                    f"{ms['base']['median']:.1f}",
                    spread(ratio["pvm"]),
                    spread(ratio["reprojected"]),
                    f"{result['bytes_floor']['pvm_over_base']:.3f}",
                ]
            )
    head = ["shape", "visual tokens", "base, ms", "pvm / base", "reprojected / base", "floor, pvm"]
    return table(head, rows)


def decode(name: str, visual: str, variant: str, what: str = "share") -> str:
    """`decode FILE 256 pvm`: what a variant adds to the base, in percent; `ms`: its median."""
    file = raw(BENCHMARKS / "decode" / f"{name}.json")
    found = next(r["summary"] for r in file["results"] if str(r["visual_tokens"]) == visual)
    if what == "ms":
        return f"{found['ms_per_token'][variant]['median']:.1f} ms"
    if what == "ratio":
        return f"{spread(found['ratio_to_base'][variant])} x"
    return f"{100 * (found['ratio_to_base'][variant]['median'] - 1):.0f} %"


def decode_floor(name: str, visual: str) -> str:
    """What a memory adds to the bytes that a step must read, from sizes."""
    file = raw(BENCHMARKS / "decode" / f"{name}.json")
    found = next(r["bytes_floor"] for r in file["results"] if str(r["visual_tokens"]) == visual)
    return f"{100 * (found['pvm_over_base'] - 1):.2f} %"


def decode_quartiles(name: str) -> str:
    """How far a memory's ratio to the base spreads: the lowest and the highest quartile of all sizes."""
    found = [r["summary"]["ratio_to_base"]["pvm"] for r in raw(BENCHMARKS / "decode" / f"{name}.json")["results"]]
    return f"{min(e['q1'] for e in found):.2f} to {max(e['q3'] for e in found):.1f}"


def vismem_cost(name: str, visual: str, form: str, memories: str) -> str:
    """Time per sample with so many memories, as the ratio to plain generation: the median."""
    wanted = (int(visual), form, int(memories))
    found = raw(BENCHMARKS / "vismem" / f"{name}.json")["results"]
    row = next(r for r in found if (r["visual_tokens"], r["form"], r["invocations"]) == wanted)
    return f"{row['ratio_to_plain']['median']:.3f} x"


def vismem_cost_table() -> str:
    """Time per sample with 0 to 8 memories, as the ratio to plain generation."""
    rows = []
    for name, label in (("", "{}"), ("-batch16", "{}, batch of 16"), ("-4096", "{} (one round)")):
        file = raw(BENCHMARKS / "vismem" / f"cpu-tiny-float32{name}.json")
        for visual in file["arguments"]["visual_tokens"]:
            found = {
                r["invocations"]: r for r in file["results"] if (r["form"], r["visual_tokens"]) == ("literal", visual)
            }
            ratios = [f"{found[n]['ratio_to_plain']['median']:.2f}" if n in found else "-" for n in (0, 1, 2, 4, 8)]
            later = found[max(found)]["first_and_later_formation_ms"]
            ms = " / ".join(f"{later[kind]['later']:,.0f}" for kind in ("short", "long"))
            rows.append([label.format(thousands(visual)), *ratios, f"{ms} ms"])
    head = ["visual tokens", "0", "1", "2", "4", "8 memories", "a later short / long memory"]
    return table(head, rows)


GROWTH = BENCHMARKS / "growth.json"
_AXES = {"visual": "{} visual tokens", "images": "{} images of 1,024", "text": "{} text before", "batch": "batch of {}"}


def growth_table() -> str:
    """What both memories add at the 8B shape, from bytes and operations."""
    rows, usual = [], raw(GROWTH)["assumed"]["usual"]
    for axis, found in raw(GROWTH)["growth"].items():
        for r in found:
            if axis != "visual" and r["at"] == usual[axis]:
                continue  # the usual point stands among the visual tokens
            keeps = f"{r['pvm_keeps_mib']:,.1f} of {r['cache_mib']:,.0f}"
            shares = [f"{100 * r[name]:.2f}" for name in ("pvm_step", "pvm_prompt")]
            formed = f"{r['short_ms']:,.0f} / {r['long_ms']:,.0f}"
            samples = [f"{100 * r[name]:.0f}" for name in ("vismem_sample", "vismem_sample_8")]
            rows.append(
                [_AXES[axis].format(thousands(r["at"])), f"{r['step_ms']:.1f}", *shares, keeps, formed, *samples]
            )
    head = ["", "a token, ms", "PVM: a token, + %", "the prompt, + %", "keeps, MiB of the cache's"]
    return table([*head, "VisMem: short / long, ms", "2 memories, + %", "8, + %"], rows)


def growth(axis: str, at: str, what: str) -> str:
    """`growth visual 1024 pvm_step`: the share that a memory adds to the floor there, in percent."""
    share = next(r[what] for r in raw(GROWTH)["growth"][axis] if str(r["at"]) == at)
    return f"+{100 * share:.{0 if what.startswith('vismem') else 2}f} %"


def growth_counted() -> str:
    """How far the formulas are from what torch counted, at most."""
    found = [pair for size in raw(GROWTH)["counted"].values() for pair in size.values()]
    return f"{100 * max(abs(p['formula'] / p['counted'] - 1) for p in found):.1f} %"


def many_devices(what: str, part: str = "total") -> str:
    """Of a 72B base with a PVM over 8 GPUs: what is kept or moved, in GB, MB or KB."""
    found = raw(GROWTH)["many"]
    if what in ("one", "fsdp2"):
        return f"{found[what][part] / 1e9:,.1f} GB"
    scale, unit = {"tp_moves_per_token": (1e6, "MB"), "tp_cache_per_token": (1e3, "KB")}.get(what, (1e9, "GB"))
    return f"{found[what] / scale:,.1f} {unit}"


def serve_table() -> str:
    """Tokens per second on the Hugging Face path."""
    found = raw(BENCHMARKS / "serve" / "cpu-15m.json")["result"]["summary"]
    named = {
        "generate": "`generate`, one request at a time",
        "transformers": "`transformers serve`",
        "keepsight": "`keepsight serve`",
        "keepsight+pvm": "`keepsight serve` with PVM",
    }
    rows = [
        [label, *(f"{found[k][n]['tokens_per_second']['median']:.0f}" if n in found[k] else "-" for n in "148")]
        for k, label in named.items()
    ]
    return table(["tokens per second (median)", "1 client", "4 clients", "8 clients"], rows)


def train(name: str, variant: str, what: str = "ratio") -> str:
    """`train FILE VARIANT`: time against the file's reference, with quartiles; `median`; `peak`: of memory."""
    file = raw(BENCHMARKS / "train" / f"{name}.json")
    found, reference = file["summary"][variant], file["summary"][file["reference"]]
    if what == "peak":
        return f"{found['peak_bytes'] / reference['peak_bytes']:.2f} x"
    if what == "median":
        return f"{found['ratio']['median']:.2f} x"
    return f"{spread(found['ratio'])} x"


def train_against(name: str, variant: str, other: str) -> str:
    """The same against another variant of the file: the median over rounds."""
    samples = raw(BENCHMARKS / "train" / f"{name}.json")["samples_seconds"]
    ratios = sorted(a / b for a, b in zip(samples[variant], samples[other], strict=True))
    middle = len(ratios) // 2
    return f"{(ratios[middle] + ratios[-middle - 1]) / 2:.2f} x"


def sft_table() -> str:
    """A step of supervised training."""
    rows = []
    for label, name in (("plain", ""), ("gradient checkpointing", "-checkpointing")):
        file = f"sft-cpu-tiny-float32{name}"
        found = raw(BENCHMARKS / "train" / f"{file}.json")["summary"]
        ms = [f"{found[m]['ms']['median']:.1f}" for m in ("pvm", "lora")]
        rows.append([label, *ms, spread(found["pvm"]["ratio"]), train(file, "pvm", "peak").removesuffix(" x")])
    return table(["", "PVM, ms", "LoRA, ms", "PVM / LoRA, time", "PVM / LoRA, peak memory"], rows)


def grpo_table() -> str:
    """A step of VisMem's stage I."""
    name = "grpo-cpu-tiny-float32"
    file = raw(BENCHMARKS / "train" / f"{name}.json")
    named = {
        "trl": "TRL, the same words",
        "trl-equal": "TRL, as many positions",
        "vismem-replay": "VisMem with dS (the paper's)",
        "vismem-score": "VisMem without (`--gain score`)",
    }
    rows = []
    for key, label in named.items():
        found = file["summary"][key]
        equal = train_against(name, key, "trl-equal").removesuffix(" x") if key == "vismem-replay" else ""
        written = f"{file['settings']['positions_written_per_trajectory'][key]:.0f}"
        ratio = "1" if key == "trl" else spread(found["ratio"])
        peak = train(name, key, "peak").removesuffix(" x")
        rows.append([label, written, f"{found['ms']['median']:,.0f}", ratio, equal, peak])
    head = ["", "positions written per trajectory", "ms", "x trl", "x trl-equal", "peak memory, x trl"]
    return table(head, rows)


def vllm_table() -> str:
    """vLLM with a PVM and without."""
    rows = [
        [str(e["batch"]), *(spread(e[k]) for k in ("throughput_ratio", "token_time_ratio", "cpu_ratio"))]
        for e in raw(BENCHMARKS / "serve" / "vllm-tiny-float32-eager.json")["summary"]
    ]
    head = ["throughput", "time per token", "tokens per CPU second"]
    return table(["requests at once", *(f"{what}, with / without" for what in head)], rows)


def vllm_vismem_table() -> str:
    """vLLM as VisMem's writer, against the Hugging Face path."""
    found = raw(BENCHMARKS / "serve" / "vllm-vismem-tiny-float32-eager.json")["summary"]
    rows = [
        [
            str(e["batch"]),
            "on" if e["memory"] else "off",
            *(f"{e[engine]['tokens_per_cpu_second']:.1f}" for engine in ("transformers", "vllm")),
            spread(e["cpu_ratio"], 2),
            spread(e["throughput_ratio"], 2),
        ]
        for e in sorted(found, key=lambda e: (not e["memory"], e["batch"]))
    ]
    head = ["clients", "memory", "tokens per CPU second, without vLLM", "with vLLM", "ratio", "by the clock, ratio"]
    return table(head, rows)


def vllm_ratio(name: str, batch: str, memory: str = "") -> str:
    """Tokens per CPU second, the median ratio: `pvm 8`, or `vismem 8 on`."""
    file = "vllm-tiny-float32-eager" if name == "pvm" else "vllm-vismem-tiny-float32-eager"
    wanted = {"on": True, "off": False}.get(memory)
    found = next(
        e
        for e in raw(BENCHMARKS / "serve" / f"{file}.json")["summary"]
        if str(e["batch"]) == batch and e.get("memory") == wanted
    )
    return f"{found['cpu_ratio']['median']:.2f} x"


def serve_ratio(variant: str, other: str) -> str:
    """Tokens per second with eight clients against `generate`, the medians; or against `transformers`, by round."""
    found = raw(BENCHMARKS / "serve" / "cpu-15m.json")["result"]
    if other == "generate":
        medians = [found["summary"][v][n]["tokens_per_second"]["median"] for v, n in ((variant, "8"), (other, "1"))]
        return f"{medians[0] / medians[1]:.1f} times"
    rounds = zip(*([e["seconds"] for e in found["samples"][v]["8"]] for v in (other, variant)), strict=True)
    *first, last = (f"{a / b:.1f}" for a, b in sorted(rounds, key=lambda pair: pair[0] / pair[1]))
    return f"{', '.join(first)} and {last} times"


def soak(what: str) -> str:
    """Of the ten-minute run: `compared`, `tried` (429, tried again), `memory` by quarter."""
    found = raw(BENCHMARKS / "serve" / "soak-10-minutes.json")["result"]
    if what == "memory":
        return ", ".join(f"{value:.0f}" for value in found["resident_mb_by_quarter"]) + " MB"
    asked = found["requests"]
    if what == "tried":
        return f"{asked['429, tried again']:,} times"
    kinds = set(asked) - {"429, tried again"}
    kinds = kinds & {"good", "several", "upload", "slow"} if what == "compared" else kinds
    return f"{sum(asked[kind] for kind in kinds):,}"


def startup(what: str) -> str:
    """CPU seconds of starting something, the median, or its `mib`."""
    name, _, unit = what.partition("/")
    found = raw(BENCHMARKS / "startup" / "cpu.json")["summary"][name.replace("_", " ")]
    return f"{found['peak_mib']['median']:.0f} MiB" if unit else f"{found['cpu']['median']:.2f}"


def meter(pair: str) -> str:
    """The attention meter's CPU time against plain generation, in one pair of runs."""
    plain, metered = raw(BENCHMARKS / "diagnose" / "cpu-reference.json")["pairs"][int(pair)]
    return f"{metered / plain:.2f} times"
