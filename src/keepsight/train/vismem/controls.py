"""VisMem's controls: the same questions, steps, seeds and scores, learned by the policy itself, without a memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import get_peft_model

from keepsight.backbone import Backbone
from keepsight.data.check import CheckedData
from keepsight.errors import KeepsightError
from keepsight.train.run import output
from keepsight.train.run.accounting import RunCost
from keepsight.train.run.controls import WHAT, Comparison, Control, Outcome, control_folder
from keepsight.train.run.learner import matched_lora
from keepsight.train.vismem.asked import Run, record_of
from keepsight.train.vismem.report import VisMemReport
from keepsight.train.vismem.run import Made, execute, load_here, ready
from keepsight.train.vismem.stages import PolicyAlone
from keepsight.vismem import VisMemConfig, add_memory_tokens

#: The smallest memory there is: it carries the tokens, and is never invoked.
_UNUSED: dict[str, Any] = {
    "num_queries": 1,
    "num_short": 1,
    "num_long": 1,
    "query_width": 8,
    "query_heads": 1,
    "query_layers": 1,
    "short_rank": 1,
    "long_rank": 1,
}


def check_controls(controls: Sequence[Control]) -> None:
    """Refuse what is no control of a latent memory.

    Raises:
        KeepsightError: for "mlp".
    """
    if any(control.name == "mlp" for control in controls):
        raise KeepsightError(
            "--control mlp is PVM's: a branch beside every block, which VisMem has not. Take lora, which has as many "
            "parameters as the memory; `keepsight diagnose` holds a memory against another image's and against noise."
        )


def compare(
    run: Run,
    report: VisMemReport,
    base: str,
    parameters: int,
    controls: Sequence[Control],
    data: CheckedData,
    held_out: CheckedData | None,
) -> Comparison:
    """Train the controls, and set them beside the memory.

    Args:
        run: of the memory.
        report: what came of it.
        base: the plain model.
        parameters: of the whole memory, which a LoRA is to match.
        controls: what to train.
        data: what the memory was trained on.
        held_out: what it was evaluated on.
    """
    two_stages = report.stage == "invocation"
    words = {"formation": "the memory, invoked at random", "invocation": "the memory, invoked by the model"}
    outcomes = [report.outcome("vismem", words[report.stage], run.settings.lr)]
    for control in controls:
        if control.name == "none":
            outcomes.append(_untrained(report))
            continue
        settings = replace(run.settings, lr=control.rate(run.settings.lr))
        start = _start(run, control, base)
        own = replace(run, folder=control_folder(run.folder, control), settings=settings, source=start, overwrite=False)
        run.say(f"control {control.name} in {own.folder}, from {start}")
        if own.is_main:
            output.check_output(own.folder, own.resume)
        record = record_of(own, f"control {control.name}", None, data)
        record["parameters"] = parameters

        def make(own: Run = own, control: Control = control) -> Made:
            return _made(own, base, control, parameters)

        found = execute(own, f"vismem control {control.name}", record, data, held_out, make)
        outcomes.append(found.outcome(control.name, WHAT[control.name], settings.lr))
    about = "no questions were held out" if held_out is None else f"evaluated on {held_out.rows:,} held-out questions"
    return Comparison(
        tuple(outcomes),
        f"The same questions, steps and seeds, GRPO for all; {about}, one sampled answer each, from the same seeds. "
        "Controls are rewarded by the score itself: without a memory there is no gain from one."
        + " They go on from those of the same name beside stage I, where there are some; else they start from the base "
        "and have stage II's steps alone." * two_stages,
    )


def _start(run: Run, control: Control, base: str) -> str:
    """Where a control starts: where its own stage I left it, if the memory's folder holds that; else at the base."""
    before = control_folder(Path(run.source), control)
    kept = "config.json" if control.name == "sft" else "adapter_config.json"
    return str(before) if (before / kept).is_file() else base


def _untrained(report: VisMemReport) -> Outcome:
    """The base as it is: the run's own model, never invoking, and without a LoRA that stage II has trained on it."""
    metrics = report.metrics or {}
    found = metrics.get("eval_reward_of_base", metrics.get("eval_reward_without_memory"))
    return Outcome(
        "none", WHAT["none"], metrics=None if found is None else {"eval_reward": found}, cost=RunCost(name="none")
    )


def _made(run: Run, base_name: str, control: Control, parameters: int) -> Made:
    whole = control.name == "sft"
    settings = replace(run.settings, dtype="float32") if whole else run.settings
    goes_on = str(run.source) != base_name
    base, processor = load_here(run.source, run.source if whole else base_name, settings, trainable=goes_on)
    parts = Backbone.of(base)
    wrapper: Any = base
    if whole:
        modules = (parts.decoder, base.get_input_embeddings(), base.get_output_embeddings())
        wanted = {id(p) for module in modules for p in module.parameters()}
    else:
        if not goes_on:
            wrapper = get_peft_model(base, matched_lora(parts, parameters)[0])
        wrapper.peft_config["default"].base_model_name_or_path = base_name
        wanted = {id(p) for name, p in wrapper.named_parameters() if ".lora_" in name}
    spare = copy.deepcopy(processor)  # what is saved has no memory's tokens
    config = VisMemConfig(**_UNUSED)
    add_memory_tokens(spare, config)
    model = ready(get_peft_model(parts.model, config, adapter_name="unused"), run.say)
    names = [name for name, p in model.named_parameters() if id(p) in wanted]

    def save(folder: Path) -> None:
        if whole:
            tensors = {n: t for n, t in parts.model.state_dict().items() if ".latent_memory." not in n}
            parts.model.save_pretrained(folder, state_dict=tensors)
        else:
            wrapper.save_pretrained(str(folder))
        processor.save_pretrained(str(folder))

    return Made(model, spare, PolicyAlone(model, run.settings, names), save)
