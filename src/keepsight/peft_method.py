"""What every memory shares as a method of PEFT: its place in the list, its config, its off switch and its tuner."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from keepsight import card, compat, loading
from keepsight.errors import AdapterMismatchError, KeepsightError, MergeError
from keepsight.settings import check_kinds
from keepsight.tested import warn_of_untested
from keepsight.threads import PerThread


def add_peft_type(name: str) -> None:
    """Add a member to PEFT's closed list of methods; the rest is PEFT's own `register_peft_method`."""
    if name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_, member._value_, member._sort_order_ = name, name, len(PeftType)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


def refuse_unknown_keys(cls: type) -> type:
    """Class decorator: make `cls(**kwargs)` raise ValueError for unknown names, and for values of another kind.

    What `cls.retired` names, setting -> (value, lesson), may be given with that value only, and is dropped.

    A dataclass raises TypeError, which PEFT takes as "a newer config" when it reads one from disk: it drops the key
    with a warning, and the user's setting silently has no effect.
    """
    init = vars(cls)["__init__"]
    names = [f.name for f in dataclasses.fields(cls)]
    retired: dict[str, tuple[Any, str]] = getattr(cls, "retired", {})

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in retired.keys() & kwargs.keys():
            found, (only, lesson) = kwargs.pop(name), retired[name]
            if found != only:
                raise ValueError(f"{name}={found!r}: {lesson}")
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{cls.__name__} has no setting {name!r}.{hint} Known: {', '.join(sorted(names))}.")
        check_kinds(cls, kwargs)
        init(self, *args, **kwargs)

    setattr(cls, "__init__", checked)  # noqa: B010 - mypy refuses the plain assignment
    return cls


def config_from_adapter(cls: type, saved: dict[str, Any]) -> Any:
    """The config of class `cls` that an `adapter_config.json` holds, as a dictionary."""
    return cls(**{name: value for name, value in saved.items() if name not in ("peft_type", "auto_mapping")})


def check_base(config: Any, model_config: Any, **more: Any) -> dict[str, Any]:
    """Compare the base that a memory's config was resolved for, if it was, with a model's configuration.

    Args:
        config: the memory's config, with fields of these names.
        model_config: the configuration of the model at hand.
        more: further `base_*` settings of the method, as they are for that model.

    Returns:
        The `base_*` settings as they would be for that model.

    Raises:
        AdapterMismatchError: if they differ.
    """
    text = model_config.get_text_config()
    found = {
        "base_model_type": model_config.model_type,
        "base_num_layers": text.num_hidden_layers,
        "base_hidden_size": text.hidden_size,
        **more,
    }
    recorded = {name: getattr(config, name) for name in found}
    wrong = [name for name, value in recorded.items() if value is not None and value != found[name]]
    if wrong:
        raise AdapterMismatchError(
            "This memory was made for another base model: "
            + ", ".join(f"{name.removeprefix('base_')} {recorded[name]}, here {found[name]}" for name in wrong)
            + f". Load it on {config.base_model_name_or_path or 'the model it was trained with'}, "
            f"or train a new one with a fresh {type(config).__name__}()."
        )
    return found


class MemoryConfig(PeftConfig):
    """PEFT's config, as all memories need it: saved with a model card of ours."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's own; then the card, and files that everybody may read."""
        config = card.to_be_written(self)
        super(MemoryConfig, config).save_pretrained(save_directory, **kwargs)
        card.finish(Path(save_directory), config)


@dataclass
class _Switch:
    """What is switched off in one thread."""

    off: tuple[Any, ...] = ()


_switches = PerThread(_Switch)


@contextlib.contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """Switch every memory of `model` off, for the length of the block and in the current thread, and nothing else.

    `PeftModel.disable_adapter()` switches off whatever method came first on the model, a LoRA perhaps, touches which
    parameters train, and does so for every thread; this does neither.

    Example:
        >>> with memory_off(model):
        ...     base = model.generate(**inputs)
    """
    switch = _switches.here
    before = switch.off
    switch.off = (*before, *(module for module in model.modules() if isinstance(module, MemoryBranch)))
    try:
        yield
    finally:
        switch.off = before


class MemoryBranch(BaseTunerLayer):
    """What hangs beside a module of the model and holds the memory of every adapter.

    A memory is off for one of two reasons, both of which are looked at here and nowhere else: PEFT's own
    `disable_adapter`, for everybody, or `memory_off`, for one thread.
    """

    @property
    def beside(self) -> Any:
        """A module of the base, whose device and dtype new memories get."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """What PEFT takes device and dtype of new adapters from."""
        return self.beside.weight

    @property
    def place(self) -> torch.device:
        """Where a memory belongs: where its module computes, also where accelerate keeps the module's weight elsewhere
        (on the CPU, on disk) and brings it for each call. A memory is small, and stays."""
        if not self.weight.is_meta:
            return self.weight.device
        return torch.device(getattr(getattr(self.beside, "_hf_hook", None), "execution_device", None) or "meta")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or self.place)

    @property
    def is_off(self) -> bool:
        """Whether no adapter of this branch may act in the current thread."""
        return self.disable_adapters or self in _switches.here.off

    # PEFT calls these on every adapter layer of a model when the adapters of another method are merged.

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of a memory is ever merged."""

    def unmerge(self) -> None:
        """Nothing was merged."""


def refuse_adapter_names(kwargs: dict[str, Any], active: str) -> None:
    """Raise if a call chooses an adapter for each row: no memory would hear of it."""
    if kwargs.get("adapter_names") is not None:
        raise KeepsightError(
            "adapter_names= chooses an adapter for each row of a batch, which a memory cannot: all rows use the "
            f"active adapter. Call model.set_adapter({active!r}) and leave adapter_names out, one call for each "
            "adapter."
        )


def offloaded(model: Any) -> bool:
    """Whether parts of a model's weights wait on the CPU or on disk, from where accelerate brings them."""
    return bool({"cpu", "disk"} & set((getattr(model, "hf_device_map", None) or {}).values()))


def _refuse_unhooked(model: Any) -> None:
    """Raise if PEFT has taken off what brings a model's offloaded weights, to divide the model anew."""
    if offloaded(model) and any(p.is_meta and not hasattr(m, "_hf_hook") for m in model.modules() for p in _own(m)):
        raise KeepsightError(
            "The model's weights are partly on the CPU or on disk (device_map), and PEFT divides such a model anew as "
            "it loads an adapter, which loses weights that are on disk. Write keepsight.load(ADAPTER, device_map=..., "
            "offload_folder=...), which leaves the model where it is; or load the base without offloading."
        )


def _own(module: nn.Module) -> Iterator[torch.Tensor]:
    return module.parameters(recurse=False)


class MemoryTuner(BaseTuner):
    """PEFT's tuner, as all memories need it: beside other methods on one model, and never merged.

    A memory's branch hangs *beside* the model's modules, so that other adapters keep their parameters' names; and its
    tuner acts on its own branches only, so that they keep their switches.

    Attributes:
        config_cls: the method's config.
        place: the branch's name in the module that it hangs beside.
        container: the branch's ModuleDict of adapters.
        no_merge: why it cannot be merged.
    """

    target_module_mapping = {}  # noqa: RUF012 - an instance variable to PEFT
    config_cls: ClassVar[type]
    place: ClassVar[str]
    container: ClassVar[str]
    no_merge: ClassVar[str]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        warn_of_untested()
        taken = {
            name
            for module in model.modules()
            if isinstance(module, BaseTunerLayer) and not isinstance(module, self.tuner_layer_cls)
            for name in module._get_available_adapters()
        }
        if adapter_name in taken:
            raise KeepsightError(
                f"The model already carries an adapter named {adapter_name!r} of another method. Name the memory "
                f"differently: get_peft_model(model, {self.config_cls.__name__}(), adapter_name='memory')."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        # Our own name for the list of adapters: PEFT takes the model's away when a LoRA beside us is unloaded.
        self.__dict__["peft_config"] = self.peft_config

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add an adapter as its config says; a `state_dict` must be its memory's, in full.

        PEFT lets the names of a state dict say which modules are adapted. Of a memory the config says it, so that a
        part of one is seen to be a part.

        Raises:
            BrokenAdapterError: naming one missing and one expected tensor of the `state_dict`.
        """
        _refuse_unhooked(model)
        config = self.peft_config[adapter_name]
        from_file = config.inference_mode or getattr(config, "base_hidden_size", None) is not None
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        memories = [memory for _, memory in self._memories(model, adapter_name)]
        for memory in memories:
            loading.remember_fresh(memory)
        if state_dict is not None:
            self._refuse_unfit(model, adapter_name, state_dict)
        elif from_file:
            compat.when_loaded(model, functools.partial(self._check_placed, model, adapter_name))
        if config.inference_mode:
            loading.expect_weights(model, memories)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        refuse_adapter_names(kwargs, self.active_adapters[0])
        yield

    def _make_branch(self, target: Any, target_name: str) -> Any:
        """A branch for a module of the model."""
        raise NotImplementedError

    def _attach(self, branch: Any) -> None:
        """Hook a new branch, which hangs in its place, into the model."""
        raise NotImplementedError

    def _add_memory(self, branch: Any, adapter_name: str, config: Any) -> None:
        """Give a branch the memory of one adapter."""
        raise NotImplementedError

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, *args: Any, **kwargs: Any
    ) -> None:
        branch = getattr(target, self.place, None)
        if branch is None:
            branch = self._make_branch(target, target_name)
            branch._active_adapter = self.active_adapter
            target.add_module(self.place, branch)
            self._attach(branch)
        self._add_memory(branch, adapter_name, peft_config)

    def _detach(self) -> None:
        """Take the method's branches and hooks off the model."""
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for branch in self.model.modules():
            if isinstance(branch, self.tuner_layer_cls):
                branch.enable_adapters(enabled)

    def _check_merge_allowed(self) -> None:
        raise MergeError(
            f"{self.no_merge} Save it with save_pretrained and load it beside the base; unload() removes it."
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises MergeError: there is nothing that could be merged."""
        self._check_merge_allowed()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge_allowed()
        self._detach()
        remaining = {n: c for n, c in self.peft_config.items() if not isinstance(c, self.config_cls)}
        if remaining:
            self.model.peft_config = remaining
        else:
            self.model.__dict__.pop("peft_config", None)
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The name sits in the middle of the key (pvm_blocks.<name>.cross_attn.q_proj.weight), where PEFT's own rule,
        # made for names at the end, does not find it.
        return key.replace(f".{cls.container}.{adapter_name}.", f".{cls.container}.", 1)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's own; random weights stay random in another dtype."""
        memories = [memory for _, memory in self._memories(self.model, adapter_name)]
        fresh = [memory for memory in memories if loading.fresh_parameters(memory)]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for memory in fresh:
            loading.remember_fresh(memory)

    @classmethod
    def _memories(cls, model: nn.Module, adapter_name: str) -> list[tuple[Any, nn.Module]]:
        """(branch, memory of one adapter in it)."""
        branches: list[Any] = [module for module in model.modules() if isinstance(module, cls.tuner_layer_cls)]
        found = [(branch, getattr(branch, cls.container)) for branch in branches]
        return [(branch, memories[adapter_name]) for branch, memories in found if adapter_name in memories]

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's own, for tensors that are all there and nothing else."""
        compat.not_loaded(model)
        cls._refuse_unfit(model, adapter_name, state_dict)
        for _, memory in cls._memories(model, adapter_name):
            loading.forget_fresh(memory)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _own(cls, present: Mapping[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
        """The memory's among the tensors of a model, as its file names them."""
        mark = f".{cls.container}.{adapter_name}."
        return {cls._remove_adapter_name_from_key(n, adapter_name): t for n, t in present.items() if mark in n}

    @classmethod
    def _refuse_unfit(cls, model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
        """Raise if a state dict is not that of an adapter's memory, in full."""
        present = model.state_dict()
        with cls._nobody_goes_on(model, adapter_name):
            loading.check_stored(state_dict, cls._own(present, adapter_name), present, adapter_name)

    @classmethod
    def _check_placed(cls, model: nn.Module, adapter_name: str, extra: list[str]) -> None:
        """Raise if transformers' own loading left names over, or parts of a memory random."""
        present = dict(model.named_parameters())
        memories = [memory for _, memory in cls._memories(model, adapter_name)]
        fresh = {id(memory.get_parameter(name)) for memory in memories for name in loading.fresh_parameters(memory)}
        own = cls._own(present, adapter_name)
        with cls._nobody_goes_on(model, adapter_name, in_part=True):
            loading.check_placed(extra, own, {n for n, p in own.items() if id(p) in fresh}, adapter_name)

    @classmethod
    @contextlib.contextmanager
    def _nobody_goes_on(cls, model: nn.Module, adapter_name: str, in_part: bool = False) -> Iterator[None]:
        """Where weights do not fit, what was made for them is taken away, also where it was loaded `in_part`; a memory
        that had its weights stays."""
        try:
            yield
        except KeepsightError:
            memories = cls._memories(model, adapter_name)
            new = [m for _, m in memories if len(loading.fresh_parameters(m)) == len(list(m.parameters()))]
            for branch, memory in memories:
                loading.forget_fresh(memory)
                if in_part or memory in new:
                    branch.delete_adapter(adapter_name)
            raise

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """PEFT's own, if there is a memory to be saved; warns of an embedding that the recorded base does not have."""
        if not cls._memories(model, adapter_name):
            raise KeepsightError(
                f"The model carries no memory of the adapter {adapter_name!r} any more (unload() takes it off), so "
                "there is nothing to save. Save before unloading."
            )
        base = config.base_model_name_or_path or getattr(model, "name_or_path", None)
        loading.warn_of_resized_embedding(model, base)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
