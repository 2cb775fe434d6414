"""PEFT's tuner as all memories need it: beside other methods on one model, loaded in full, never merged."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from keepsight import compat, loading
from keepsight.errors import KeepsightError, MergeError
from keepsight.tested import warn_of_untested


def refuse_adapter_names(kwargs: dict[str, Any], active: str) -> None:
    """Raise if a call chooses an adapter for each row: no memory would hear of it."""
    if kwargs.get("adapter_names") is not None:
        raise KeepsightError(
            "adapter_names= chooses an adapter for each row of a batch, which a memory cannot: all rows use the "
            f"active adapter. Call model.set_adapter({active!r}) and leave adapter_names out, one call for each "
            "adapter."
        )


def _offloaded(model: Any) -> bool:
    """Whether parts of a model's weights wait on the CPU or on disk, from where accelerate brings them."""
    return bool({"cpu", "disk"} & set((getattr(model, "hf_device_map", None) or {}).values()))


def _refuse_unhooked(model: Any) -> None:
    """Raise if PEFT has taken off what brings a model's offloaded weights, to divide the model anew."""
    if _offloaded(model) and any(p.is_meta and not hasattr(m, "_hf_hook") for m in model.modules() for p in _own(m)):
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
