"""Load the models of VisMem's stages and controls: a base, a memory new or formed, a LoRA on the policy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from keepsight.backbone import Backbone
from keepsight.checkpoints.adapters import find_adapter, inspect_adapter
from keepsight.checkpoints.bases import base_config, check_weights
from keepsight.checkpoints.load import attach
from keepsight.checkpoints.sources import check_sources
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.run.controls import Control
from keepsight.train.run.engines import current_engine
from keepsight.train.run.four_bit import load_base
from keepsight.train.run.learner import POLICY_ADAPTER, Learner, matched_lora
from keepsight.train.run.preflight import Say, base_device
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings, RlSettings
from keepsight.train.vismem.stages import ControlStage, FormationStage, InvocationStage, Stage
from keepsight.vismem import VisMemBranch, VisMemConfig, add_memory_tokens

#: The smallest memory there is: it carries the tokens of a control, and is never invoked.
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


@dataclass(frozen=True)
class LoadedStage:
    """A model to train.

    Attributes:
        model: carries VisMem (which a control never invokes).
        processor: with the memory's tokens.
        stage: what is trained.
        save: writes what was trained, and the processor, into a folder.
    """

    model: Any
    processor: Any
    stage: Stage
    save: Callable[[Path], None]


def plan_vismem(source: str | Path, vismem: VisMemConfig | None = None) -> tuple[VisMemConfig, int]:
    """A memory's resolved configuration on a base and its number of parameters, worked out without reading weights.

    Raises:
        ValueError: if sizes do not fit the base.
        FileNotFoundError, KeepsightError: if the base is missing or broken.
    """
    config = base_config(source)
    check_weights(source)
    found = copy.deepcopy(vismem) if vismem is not None else VisMemConfig()
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config)
        found.resolve(Backbone.of(base))
        model = get_peft_model(base, copy.deepcopy(found))
    return found, sum(p.numel() for p in VisMemBranch.of(model).active.parameters())


def adapter_config(source: str | Path) -> tuple[VisMemConfig, str]:
    """(an adapter's configuration, its base); raises unless it is a whole VisMem adapter from stage I."""
    path = find_adapter(source)
    assert path is not None
    method = inspect_adapter(path).method
    if method != "VISMEM":
        raise KeepsightError(f"{source} is a {method} adapter; expected a VisMem adapter.")
    base, infos = check_sources(source)
    check_weights(base)
    if len(infos) > 1:
        raise KeepsightError(
            f"{source} holds a trained policy beside its memory: it has been through stage II with --train lora, which "
            "is the last stage. Start from the folder of stage I."
        )
    return VisMemConfig.from_pretrained(str(infos[0].path)), base


def load_new(base: str, vismem: VisMemConfig | None, settings: FormationSettings, say: Say) -> LoadedStage:
    """Stage I with a new memory on a base."""
    model, processor = _load(base, base, settings)
    own = copy.deepcopy(vismem) if vismem is not None else VisMemConfig()
    add_memory_tokens(processor, own)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = get_peft_model(model, own)
    return _of_memory(_ready(model, say), processor, FormationStage, settings)


def load_formed(source: str, base: str, settings: FormationSettings, say: Say) -> LoadedStage:
    """Stage I with a memory that goes on from an adapter."""
    model, processor = _load(source, base, settings, trainable=True)
    return _of_memory(_ready(model, say), processor, FormationStage, settings)


def load_invoking(source: str, base: str, settings: InvocationSettings, say: Say) -> LoadedStage:
    """Stage II on the memory of stage I; with `train="lora"`, and a new LoRA on the policy."""
    policy = None
    if settings.train == "tokens":
        model, processor = _load(source, base, settings, trainable=True)
    else:
        model, processor, policy = _with_policy(source, base, settings)
    if VisMemBranch.of(model).active.short_bank.is_untrained:
        warnings.warn(
            "The memory of this adapter was never trained: stage II would learn when to invoke noise. Run stage I "
            "(keepsight train vismem-formation) first.",
            KeepsightWarning,
            stacklevel=2,
        )
    return _of_memory(_ready(model, say), processor, InvocationStage, settings, policy)


def load_control(
    source: str, base: str, control: Control, parameters: int, settings: RlSettings, say: Say
) -> LoadedStage:
    """A control: the policy itself, or a LoRA on it, beside a memory that is never invoked.

    Args:
        source: the control's own stage I, or the base.
        base: the plain model.
        control: which one.
        parameters: that a LoRA is to match.
        settings: of the stage it is held against.
        say: receives lines for the user.
    """
    whole, goes_on = control.name == "sft", source != base
    start = source if whole else base
    plain, processor = _load(start, start, replace(settings, dtype="float32") if whole else settings)
    plain.name_or_path = plain.config.name_or_path = base
    if whole:
        learner = Learner(policy="full")
    elif goes_on:
        learner = Learner(policy="lora", policy_from=Path(source))
    else:
        learner = Learner(policy="lora", lora=matched_lora(Backbone.of(plain), parameters)[0])
    result = learner.put_on(plain, settings.seed)
    wanted = {id(parameter) for parameter in result.parameters() if parameter.requires_grad}
    spare = copy.deepcopy(processor)  # what is saved has no memory's tokens
    config = VisMemConfig(**_UNUSED)
    add_memory_tokens(spare, config)
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(settings.seed)  # a resumed run finds the same bits
        warnings.filterwarnings("ignore", message="(Already found a|You are trying to modify a model)")
        model = _ready(get_peft_model(plain, config, adapter_name="unused"), say)
    names = [name for name, parameter in model.named_parameters() if id(parameter) in wanted]

    def save(folder: Path) -> None:
        if whole:
            tensors = {n: t for n, t in plain.state_dict().items() if ".latent_memory." not in n}
            plain.save_pretrained(folder, state_dict=tensors)
        else:
            result.save_pretrained(str(folder), selected_adapters=["default"])
        processor.save_pretrained(str(folder))

    return LoadedStage(model, spare, ControlStage(model, settings, names), save)


def _load(source: str, base: str, settings: RlSettings, trainable: bool = False) -> tuple[Any, Any]:
    """(model, processor) of a base, or of an adapter on it, where this process trains."""
    device = base_device(settings, current_engine())
    return load_base(source, base, settings, settings.dtype, device, trainable)


def _ready(model: Any, say: Say) -> Any:
    """The model with its memory in float32, or wider if the base is; its base in a dtype to train in."""
    base = Backbone.of(model).model
    if base.dtype == torch.float16:
        better = torch.bfloat16 if base.device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        base.to(better)
        say(f"the base is stored in float16, which overflows in training; it is used in {better}".replace("torch.", ""))
    VisMemBranch.of(model).active.to(torch.promote_types(base.dtype, torch.float32))
    return model


def _of_memory(model: Any, processor: Any, stage: type[Stage], settings: RlSettings, policy: Any = None) -> LoadedStage:
    def save(folder: Path) -> None:
        """The memory, the policy's LoRA (in the folder `policy`) if there is one, and the processor."""
        model.save_pretrained(str(folder))
        processor.save_pretrained(str(folder))
        if policy is not None:
            policy.save_pretrained(str(folder), selected_adapters=[POLICY_ADAPTER])
        for card in folder.rglob("README.md"):
            card.unlink()  # the run writes its own

    return LoadedStage(model, processor, stage(model, settings), save)


def _with_policy(source: str, base_name: str, settings: InvocationSettings) -> tuple[Any, Any, Any]:
    """(model with memory, processor, PEFT's wrapper of the policy's new LoRA)."""
    _, infos = check_sources(source)
    base, _ = _load(base_name, base_name, settings)
    processor = AutoProcessor.from_pretrained(infos[0].path, trust_remote_code=False)
    path = Backbone.of(base).decoder_path.replace(".", r"\.")
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=rf"{path}\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        policy = get_peft_model(base, lora, adapter_name=POLICY_ADAPTER)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        model = attach(policy.get_base_model(), infos, trainable=True)
    add_memory_tokens(processor, model)
    return model, processor, policy
