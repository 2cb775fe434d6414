"""GRPO's completions written by vLLM: TRL's own `use_vllm`, with a model that carries the memory.

    attach      the memory as it stands and its base are exported to a folder that vLLM loads
    sync        before completions are written, the tensors that learn go to vLLM by name, a LoRA merged into copies
    generate    TRL's; it corrects its ratios by what vLLM said of each token's probability

vLLM runs beside the trainer ("colocate", TRL's word) or as a server of its own. Nothing of vLLM or TRL is imported
before it is needed: the command line reads the options from here.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keepsight.errors import KeepsightError
from keepsight.train.run.fields import REWARD, documented, setting

if TYPE_CHECKING:
    import torch

    from keepsight.pvm import PvmConfig
    from keepsight.train.run.engines import Engine
    from keepsight.train.run.learner import Learner
    from keepsight.train.run.settings import GrpoSettings


@documented
@dataclass(frozen=True, kw_only=True)
class VllmRollouts:
    """How vLLM writes the completions of `train_pvm_grpo(..., writer=VllmRollouts(use_vllm=True))`."""

    use_vllm: bool = setting(
        False, "Completions are written by vLLM, many times as fast; causal memories only.", REWARD, "--use-vllm"
    )
    vllm_mode: Literal["colocate", "server"] = setting(
        "colocate", "vLLM on the GPUs that train, or a server of its own (keepsight export vllm, vllm serve).", REWARD
    )
    vllm_server: str = setting("http://localhost:8000", "URL of that server.", REWARD)
    vllm_gpu_memory: float = setting(0.3, "Share of a GPU's memory for vLLM beside the trainer.", REWARD)
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments for vLLM's `LLM` beside the trainer; no option of the command line."""

    def __post_init__(self) -> None:
        if not 0 < self.vllm_gpu_memory < 1:
            raise ValueError(f"vllm_gpu_memory={self.vllm_gpu_memory}: expected a share, above 0 and below 1.")

    def __str__(self) -> str:
        return f"vLLM, {self.vllm_mode}"

    def check(self, base: str, pvm: PvmConfig, learner: Learner, settings: GrpoSettings, engine: Engine) -> None:
        """Refuse what vLLM cannot write, or what its copy of the model could not follow.

        Raises:
            KeepsightError: with what to do instead.
        """
        from keepsight.serve.vllm.check import check_version
        from keepsight.serve.vllm.names import SERVED

        instead = "Leave out --use-vllm, and completions are written by transformers."
        if not pvm.causal:
            raise KeepsightError(
                "--use-vllm with a memory of the published rule (causal=false): vLLM serves causal memories only, so "
                f"completions would be written by another model than the one that learns. {instead}"
            )
        if pvm.base_model_type not in SERVED:
            known = ", ".join(served.name for served in SERVED.values())
            raise KeepsightError(
                f"--use-vllm: the vLLM plugin does not serve model_type {pvm.base_model_type!r}; it serves {known}. "
                f"{instead}"
            )
        if settings.load_in_4bit:
            raise KeepsightError(
                f"--use-vllm with --load-in-4bit: vLLM would write with other weights than those that learn. {instead}"
            )
        if engine.shards_weights:
            raise KeepsightError(
                f"--use-vllm under {engine.name}, which keeps every tensor in pieces: handing whole ones to vLLM is "
                f"not built. Use recipes/accelerate/ddp.yaml. {instead}"
            )
        if self.vllm_mode == "server" and not settings.on_gpu:
            raise KeepsightError(
                "--vllm-mode server: weights go to the server by NCCL, from GPU to GPU, and this run is on a CPU. Use "
                f"--vllm-mode colocate. {instead}"
            )
        check_version()

    def attach(self, trainer: Any, base: str) -> None:
        """Make this trainer take its completions from vLLM.

        Args:
            trainer: TRL's GRPOTrainer, made without `use_vllm`.
            base: name of the base model.
        """
        from keepsight.serve.vllm.check import prepare

        prepare()
        trainer.vllm_generation = _generation(self, trainer, base)
        trainer.use_vllm, trainer._last_loaded_step = True, -1


def learned_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What learns in a model with a memory, under the names of its checkpoint: (name, tensor).

    A LoRA is merged into a copy of each map that it changes; the model stays as it is.

    Args:
        model: the `PeftModel` of the memory, as `Learner.put_on` returns it.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import Linear

    for name, tensor in get_peft_model_state_dict(model, adapter_name="default").items():
        yield name.removeprefix("base_model.model."), tensor
    base = model.get_base_model()
    ours = model.base_model.prefix
    for name, module in base.named_modules():
        if isinstance(module, Linear):  # PEFT's, with a LoRA on it
            weight: Any = module.get_base_layer().weight
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter)
            yield f"{name}.weight", weight
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and ours not in name and ".lora_" not in name:
            yield name, parameter


def _export(model: Any, base: str, folder: Path) -> Path:
    """The model as it stands, in a folder that vLLM loads; the base's weights are links."""
    from keepsight.serve.vllm.export import export_vllm

    model.save_pretrained(folder / "memory", selected_adapters=["default"])
    return export_vllm(folder / "memory", folder / "model", base=base).folder


def _generation(options: VllmRollouts, trainer: Any, base: str) -> Any:
    """TRL's bridge to vLLM, which hands over a memory's tensors beside the language model's."""
    import torch
    from trl.generation.vllm_generation import VLLMGeneration

    from keepsight.backbone import Backbone
    from keepsight.serve.vllm.names import SERVED

    class MemoryGeneration(VLLMGeneration):
        def _init_vllm(self) -> None:
            if self.mode == "server":
                return super()._init_vllm()
            from vllm import LLM

            alone = self.accelerator.num_processes == 1
            if not alone:  # vLLM reads from here which of the processes this is
                os.environ["RANK"] = str(self.accelerator.process_index)
                os.environ["LOCAL_RANK"] = str(self.accelerator.local_process_index)
                os.environ["WORLD_SIZE"] = str(self.accelerator.num_processes)
            half = trainer.args.bf16 or base_model.dtype == torch.bfloat16
            defaults: dict[str, Any] = {
                "dtype": "bfloat16" if half else "float32",
                "gpu_memory_utilization": self.gpu_memory_utilization,
                "max_num_seqs": self.max_num_seqs,
                "distributed_executor_backend": None if alone else "external_launcher",
                "seed": trainer.args.seed + self.accelerator.process_index,
                "mm_processor_cache_gb": 0,  # images of a prompt that is asked again come again
            }
            needed = {"logprobs_mode": "processed_logprobs"}  # after temperature and top-p, which TRL's ratios want
            self.folder = tempfile.TemporaryDirectory(prefix="keepsight-vllm-")
            model = _export(base_model, base, Path(self.folder.name))
            self.llm = LLM(str(model), **{**defaults, **options.engine, **needed})
            if trainer.setup.learner.policy != "none" and any(self.llm.apply_model(_is_packed)):
                raise KeepsightError(
                    "--use-vllm: this build of vLLM (for CPUs) packs the language model's weights when it loads them, "
                    "and packed ones cannot follow what learns. Use --policy none, a GPU, or leave out --use-vllm."
                )
            self._llm_weights_sleeping = False
            self.accelerator.wait_for_everyone()

        def _iter_named_params(self) -> Iterator[tuple[str, Any]]:
            with torch.no_grad():
                yield from learned_tensors(base_model)

        def sync_weights(self) -> None:
            if self.mode == "server":
                return super().sync_weights()
            self.llm.apply_model(lambda model: model.load_weights(self._iter_named_params()) and None)
            self.llm.reset_prefix_cache()

        def generate(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
            asked = [_collapsed(ids, image, framed) for ids in prompts]
            read, *written = super().generate(asked, *args, **kwargs)
            for ours, theirs in zip(prompts, read, strict=True):
                _check_same(list(ours), list(theirs))
            return read, *written

    base_model = trainer.accelerator.unwrap_model(trainer.model)
    backbone = Backbone.of(base_model)
    (image,) = backbone.visual_token_ids(("image",))
    framed = SERVED[base_model.config.model_type].frames_images
    # No completion holds a place for an image or video that is none: what TRL forbids transformers as well.
    places = backbone.visual_token_ids()
    args = trainer.args
    return MemoryGeneration(
        model=base_model,
        accelerator=trainer.accelerator,
        processing_class=trainer.processing_class,
        mode=options.vllm_mode,
        server_base_url=options.vllm_server,
        gpu_memory_utilization=options.vllm_gpu_memory,
        max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_completion_length=args.max_completion_length,
        generation_kwargs={"logit_bias": dict.fromkeys(places, -100.0)},
    )


def _is_packed(model: torch.nn.Module) -> bool:
    """Whether vLLM holds linear maps in a form of its own, their weights being empty."""
    from vllm.model_executor.layers.linear import LinearBase

    return any(isinstance(module, LinearBase) and module.weight.numel() == 0 for module in model.modules())


def _collapsed(ids: list[int], image: int, framed: bool) -> list[int]:
    """A prompt with one token for an image: vLLM writes as many as the image needs itself.

    Args:
        ids: of the prompt, with as many as the processor wrote.
        image: the token.
        framed: vLLM writes those before and behind them as well.
    """
    found: list[int] = []
    skip = False
    for token, run in itertools.groupby(ids):
        here = [token] if token == image else list(run)
        if framed and token == image:
            found.pop()
        found += here[1:] if skip else here
        skip = framed and token == image
    return found


def _check_same(ours: list[int], theirs: list[int]) -> None:
    """Raise KeepsightError if vLLM has read another prompt than the one that is trained on."""
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise KeepsightError(
            f"vLLM read a prompt of {len(theirs)} tokens where the trainer has one of {len(ours)}; they part at token "
            f"{at}. Its image processor works otherwise than this base's, so completions would answer another prompt "
            "than the one that is trained on. Leave out --use-vllm."
        )
