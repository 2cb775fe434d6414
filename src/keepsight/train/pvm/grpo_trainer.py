"""TRL's GRPO trainer for a memory and its policy: prompts with images from any data, resumable order, an account of
its work."""

from __future__ import annotations

import copy
import json
import warnings
from typing import TYPE_CHECKING, Any

import torch

from keepsight.data.check import CheckedData
from keepsight.data.rows import read_sample
from keepsight.errors import KeepsightWarning
from keepsight.train.run.four_bit import trainable_as_it_is
from keepsight.train.run.learner import Learner
from keepsight.train.run.settings import GrpoSettings
from keepsight.train.run.trainer import LearnerTrainer, Setup, common_arguments, finish, report_callback

if TYPE_CHECKING:
    from keepsight.train.pvm.grpo import GrpoJob

_OURS = ("messages", "images", "columns")


def make_grpo_trainer(job: GrpoJob, model: Any, learner: Learner) -> Any:
    """A trainer by GRPO of what `learner.put_on` has put on a model."""
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import RepeatSampler

    settings, rewards, data, eval_data = job.settings, job.rewards, job.data, job.held_out

    class Order(RepeatSampler):
        """TRL's order of prompts, as a function of seed and epoch alone, so that a resumed epoch repeats it."""

        def set_epoch(self, epoch: int) -> None:
            self.generator.manual_seed(self.seed + epoch)

    class PvmGrpoTrainer(LearnerTrainer, GRPOTrainer):
        """TRL's GRPO trainer, with what keepsight adds."""

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            plain = super()._get_train_sampler(dataset)
            return Order(
                plain.data_source,
                plain.mini_repeat_count,
                plain.batch_size,
                plain.repeat_count,
                plain.shuffle,
                settings.seed,
            )

        def _generate(self, prompts: Any) -> Any:
            *found, images, tool_images = super()._generate(prompts)
            if images is not None:  # TRL says None for a prompt without an image, which processors do not take
                images = [of_prompt or [] for of_prompt in images] if any(images) else None
            return *found, images, tool_images

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            meter = self.setup.meter
            if meter is not None:
                rows, prompt = batch["prompt_ids"].shape
                new, patches = batch["completion_ids"].shape[1], meter.shape.patches(batch)
                written = int((batch["completion_ids"] != self._tokenizer.pad_token_id).sum())
                meter.generated(rows, prompt, new, tokens=written, patches=patches)
                for name in ("old_per_token_logps", "ref_per_token_logps"):
                    if name in batch:
                        meter.read(rows, prompt + new, patches=patches)
            return batch

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("batch_num_images", None)  # LLaVA-OneVision's, which TRL does not know: 1 (`_check_images`)
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            rows, length = inputs["prompt_ids"].shape
            tokens = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
            self.count(rows, length + inputs["completion_ids"].shape[1], tokens, inputs)
            return super()._compute_loss(model, inputs)

    processor = copy.deepcopy(job.processor)  # completions follow prompts that are padded on the left
    processor.tokenizer.padding_side = "left"
    per_prompt = settings.group_size
    args = GRPOConfig(
        **common_arguments(settings, job.asked.folder, GRPOConfig, eval_data is not None and learner.learns),
        # Whole groups in every batch of an evaluation.
        per_device_eval_batch_size=per_prompt * max(1, settings.batch_size // per_prompt),
        steps_per_generation=settings.rollouts // settings.batch_size,
        num_generations=per_prompt,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        beta=settings.kl,
        loss_type=settings.loss_type,
        epsilon=settings.clip,
        scale_rewards=settings.scale_rewards,
        # TRL's defaults as they were in 1.16, which another release may change.
        epsilon_high=None,
        num_iterations=1,
        importance_sampling_level="token",
        multi_objective_aggregation="sum_then_normalize",
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        mask_truncated_completions=settings.mask_truncated,
        reward_weights=[reward.weight for reward in rewards],
        shuffle_dataset=True,
        # TRL gathers the images of all processes for its logs, and waits for ever where one has none.
        log_multimodal=False,
    )
    with trainable_as_it_is(model):
        trainer = PvmGrpoTrainer(
            model=model,
            reward_funcs=list(rewards),
            args=args,
            train_dataset=as_prompts(data),
            eval_dataset=None if eval_data is None else as_prompts(eval_data),
            processing_class=processor,
            callbacks=[report_callback(job.asked.on_log), _signal_callback(settings), *job.callbacks],
        )
    trainer.model.register_forward_pre_hook(_without_empty, with_kwargs=True)
    return finish(trainer, Setup(settings, learner))


def _signal_callback(settings: GrpoSettings) -> Any:
    """A callback that warns at the end of a run whose rewards, by its logs, can have taught nothing."""
    from transformers import TrainerCallback

    class Signal(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps = [entry for entry in state.log_history if "frac_reward_zero_std" in entry]
            if not steps or not state.is_world_process_zero:
                return
            if settings.mask_truncated and all(entry.get("completions/clipped_ratio") == 1 for entry in steps):
                why = (
                    f"every completion was cut off at {settings.max_new_tokens} tokens, and such are left out of the "
                    "loss, so nothing was learned. Raise --max-new-tokens, or let them count (--no-mask-truncated)"
                )
            elif all(entry["frac_reward_zero_std"] == 1 for entry in steps):
                why = (
                    "in no step did the rewards of a prompt's completions differ, so they taught nothing. Look at what "
                    "is written and scored, raise --temperature or --group-size, or take prompts that are answered "
                    "sometimes"
                )
            else:
                return
            warnings.warn(f"{args.output_dir}: {why}.", KeepsightWarning, stacklevel=2)

    return Signal()


def _without_empty(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Leaves out tensors of no rows: TRL's share of the images where none of a forward's prompts has one."""
    return args, {name: x for name, x in kwargs.items() if not (isinstance(x, torch.Tensor) and x.shape[:1] == (0,))}


def as_prompts(data: CheckedData) -> Any:
    """A dataset whose rows are read when they are asked for: "prompt", "images" (PIL) and every other column."""
    rows = [json.loads(text) for text in data.dataset["columns"]]
    names = list(dict.fromkeys(name for row in rows for name in row))

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        count = len(batch["messages"])
        samples = [read_sample({name: batch[name][i] for name in _OURS}, data.source) for i in range(count)]
        found: dict[str, list[Any]] = {name: [sample.get(name) for sample in samples] for name in names}
        return {
            **found,
            "prompt": [sample["messages"] for sample in samples],
            "images": [sample["images"] for sample in samples],
        }

    return data.dataset.with_transform(read)
