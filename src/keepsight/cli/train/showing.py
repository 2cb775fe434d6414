"""Print a training command's progress, its report, and what a dry run found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from keepsight.cli.common.console import Interrupted, facts_table, first_of_all, out, say, warn
from keepsight.cli.common.progress import Progress
from keepsight.cli.train.options import TrainOptions
from keepsight.train.run.settings import GrpoSettings


def show_dry_run(
    source: str,
    settings: Any,
    memory: Any,
    job: TrainOptions,
    policy: str = "none",
    lora_rank: int = 16,
    recipe: str | None = None,
) -> None:
    """Print what a PVM's run would need. The length of a sample is asked for, measured on the data, or assumed."""
    from keepsight.checkpoints.sources import as_adapter
    from keepsight.pvm import PvmConfig
    from keepsight.train.estimate import dry_run
    from keepsight.train.run.learner import Learner, ranked_lora
    from keepsight.train.run.plan import plan_memory

    found = as_adapter(source)
    base, pvm = source, memory
    if found is not None:
        from keepsight.checkpoints.sources import check_sources
        from keepsight.peft_method import config_from_adapter

        base, _ = check_sources(source)
        pvm = config_from_adapter(PvmConfig, found.config)
    plan = plan_memory(base, pvm)
    length, visual, mix = _sample(base, settings, job, answers=not isinstance(settings, GrpoSettings))
    lora = ranked_lora(plan.backbone, lora_rank)[0] if policy == "lora" else None
    beside = {"full": " and the language model", "lora": f" and a LoRA of rank {lora_rank}", "none": ""}[policy]
    learner = Learner(memory=pvm or PvmConfig(), policy=policy, lora=lora)  # type: ignore[arg-type]
    result = dry_run.dry_run(base, learner, settings, length=length, visual=visual, what=f"the memory{beside}")
    _print_dry_run(result, ("recipe", recipe), ("mix", mix))


def _sample(base: str, settings: Any, job: TrainOptions, answers: bool) -> tuple[int, int | None, str | None]:
    """(tokens of a sample, how many of them are visual, the mix of several datasets), and how they are known."""
    from keepsight.train.estimate.dry_run import DEFAULT_TOKENS, measured

    found = measured(base, job.data(), job.split, answers=answers) if job.dataset else None
    mix = None if found is None else found.mix
    if job.tokens is not None:
        return job.tokens, None, mix
    if found is not None:
        say(f"the longest of the samples looked at: {found.tokens:,} tokens, {found.visual:,} of them visual")
        return found.tokens, found.visual, mix
    length = getattr(settings, "max_length", None) or DEFAULT_TOKENS
    say(f"a sample of {length:,} tokens is assumed; --tokens or --data say otherwise")
    return length, None, mix


def show_vismem_dry_run(source: str, settings: Any, config: Any, job: TrainOptions) -> None:
    """Print what a VisMem's run would need."""
    from keepsight.checkpoints.sources import as_adapter, check_sources
    from keepsight.train.vismem.dry_run import dry_run_vismem

    base = source if as_adapter(source) is None else check_sources(source)[0]
    length, visual, mix = _sample(base, settings, job, answers=False)
    found = dry_run_vismem(source, settings, config, length=length, visual=visual)
    _print_dry_run(found, ("mix", mix))


def _print_dry_run(found: Any, *more: tuple[str, str | None]) -> None:
    title = f"Dry run on {found.source} (estimates; no weights were read)"
    rows = [(name, value) for name, value in more if value is not None]
    out.print(facts_table(title, [*rows, *found.rows_of_table()]), markup=False)


def run_and_report(
    train: Callable[..., Any],
    source: str,
    job: TrainOptions,
    print_log: Callable[[dict[str, float], int, int], None],
    print_report: Callable[[Any, str], None],
) -> None:
    """Train, and show what comes of it.

    Args:
        train: the training function of a stage, with all that is not in `job`.
        source: of the model.
        job: data, folder, and what is done with them.
        print_log: shows the values of a step.
        print_report: shows the report, of this source.
    """
    from keepsight.train.run.controls import parse_controls
    from keepsight.train.run.preflight import silent

    dataset, folder = job.checked()
    if not first_of_all():
        train(source, dataset, folder, controls=parse_controls(job.control), say=silent, **job.named())
        return

    def on_log(values: dict[str, float], step: int, total: int) -> None:
        print_log(values, step, total)
        show.at(f"step {step}/{total}")

    try:
        with Progress("training", transient=True) as show:
            report = train(
                source,
                dataset,
                folder,
                controls=parse_controls(job.control),
                say=say,
                on_log=on_log,
                on_check=partial(show, "checking samples"),
                **job.named(),
            )
    except KeyboardInterrupt as stop:
        raise Interrupted(_how_to_go_on(folder)) from stop
    print_report(report, source)


def print_log(values: dict[str, float], step: int, total: int) -> None:
    """One line per logging step."""
    from keepsight.train.run.report import line

    for text in line(values, step, total):
        say(text)


def _how_to_go_on(folder: Path) -> str:
    """What to tell somebody who stopped a run."""
    from keepsight.train.run.output import last_checkpoint

    checkpoint, _ = last_checkpoint(folder)
    if checkpoint is None:
        return "stopped by Ctrl-C before the first checkpoint; nothing was saved."
    return f"stopped by Ctrl-C. {checkpoint} is whole: the same command with --resume goes on from there."


def print_report(report: Any, source: str) -> None:
    """What a run did, in a table; then its controls beside it."""
    from keepsight.words import counted

    table = facts_table(f"A memory for {source}")
    resumed = f", resumed at {report.resumed_from}" if report.resumed_from else ""
    table.add_row("steps", f"{report.steps}{resumed}, {report.seconds:.1f} s, {report.tokens:,} tokens")
    if report.first_loss is not None:
        table.add_row("loss", f"{report.first_loss:.4f} at first, {report.last_loss:.4f} at last")
    if report.first_reward is not None:
        table.add_row("reward", f"{report.first_reward:.4f} at first, {report.last_reward:.4f} at last")
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_reward"):
        if name in report.metrics and not (name == "eval_loss" and "eval_reward" in report.metrics):
            table.add_row(name.replace("_", " "), f"{report.metrics[name]:.4f}")
    table.add_row("trained", f"{report.trainable:,} parameters")
    same = {
        True: "no bit of any tensor changed (digests before and after)",
        None: "not checked: the weights are partitioned over processes",
    }
    table.add_row("frozen", f"{report.frozen:,} parameters; {same[report.base_unchanged]}")
    table.add_row("gates", ", ".join(f"layer {layer}: {gate:+.4f}" for layer, gate in report.gates.items()))
    if report.data.skipped:
        table.add_row("skipped", counted(len(report.data.skipped), "sample"))
    if report.cost is not None:
        peak = f"{report.cost.peak_memory / 2**30:.2f} GiB on the {report.cost.device}"
        table.add_row("cost", f"{report.cost.flops / 1e15:.4g} PFLOP by its shapes, at most {peak}")
    table.add_row("result", str(report.output_dir))
    table.add_row("use it", f"keepsight generate {report.output_dir} --image FILE --prompt TEXT")
    out.print(table, markup=False)
    if all(gate == 0 for gate in report.gates.values()):
        warn("Every gate is still 0, so the memory changes nothing. Train for more steps or with a larger --lr.")
    if report.comparison is not None:
        out.print(report.comparison.table(), markup=False)


def print_vismem_log(values: dict[str, float], step: int, total: int) -> None:
    """One line per logging step."""
    parts = [f"step {step:>{len(str(total))}}/{total}", f"loss {values['loss']:+.4f}", f"reward {values['reward']:.3f}"]
    parts += [f"{name} {values[name]:+.3f}" for name in ("dS", "p_type", "p_neg") if name in values]
    parts.append(f"std {values['group_std']:.3f}")
    if "kl" in values:
        parts.append(f"KL {values['kl']:.4f}")
    parts.append(f"invoked short {values['invocations/short']:.2f} long {values['invocations/long']:.2f}")
    norms = {n.partition("/")[2]: v for n, v in values.items() if n.startswith("gradient_norm/")}
    parts.append("gradients " + " ".join(f"{name} {value:.1e}" for name, value in norms.items()))
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "gpu_memory_gb" in values:
        parts.append(f"{values['gpu_memory_gb']:.1f} GB")
    say("  ".join(parts))


def print_vismem_report(report: Any, source: str) -> None:
    """What a stage did, in a table; then its controls beside it."""
    from keepsight.words import counted

    table = facts_table(f"VisMem, {report.stage}")
    resumed = f", resumed at {report.resumed_from}" if report.resumed_from is not None else ""
    table.add_row("steps", f"{report.steps}{resumed}, {report.seconds:.1f} s")
    table.add_row("tokens", f"{report.tokens_generated:,} written, {report.tokens_trained:,} trained on")
    if report.first:
        table.add_row("reward", f"{report.first['reward']:.4f} at first, {report.last['reward']:.4f} at last")
    table.add_row("trained", f"{report.trainable:,} parameters; {report.changed} tensors changed")
    table.add_row("all else", f"{report.untouched} tensors; no bit changed (digests before and after)")
    table.add_row("KL against", report.reference)
    for name, value in (report.metrics or {}).items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    table.add_row("cost", f"{report.cost.flops / 1e15:.4g} PFLOP by its shapes")
    if report.data.skipped:
        table.add_row("skipped", counted(len(report.data.skipped), "sample"))
    table.add_row("adapter", str(report.output_dir))
    following = {
        "formation": f"keepsight train vismem-invocation {report.output_dir} -d ... -o ...",
        "invocation": f"keepsight generate {report.output_dir} --image FILE --prompt TEXT",
    }
    table.add_row("next", following[report.stage])
    out.print(table, markup=False)
    if report.comparison is not None:
        out.print(report.comparison.table(), markup=False)
