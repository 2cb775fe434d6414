"""The scheduler of `keepsight serve`, with vLLM as the writer of a VisMem's answers. Experimental."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from keepsight.backbone import Backbone
from keepsight.checkpoints.adapters import AdapterInfo
from keepsight.errors import KeepsightError
from keepsight.serve.hf.engine import BatchEngine
from keepsight.serve.hf.rows import Job
from keepsight.serve.metrics import Metrics
from keepsight.serve.vllm.check import prepare
from keepsight.serve.vllm.latent_folder import write_model
from keepsight.serve.vllm.vismem import VllmBatch
from keepsight.vismem.writing.policy import MemoryPolicy

_LIMITS = "keepsight.serve.vllm.limits:MemoryLimits"


class VllmEngine(BatchEngine):
    """Runs requests on one VisMem, as `keepsight.serve.hf.engine.BatchEngine` does without vLLM.

    Args:
        base: name of the base model.
        vismem: the adapter, checked.
        model: both, as `keepsight.load` returns them: forms the memories.
        tokenizer: the processor's; a copy of it is used.
        max_batch: answers that are written at the same time.
        most_tokens: prompt and answer together, at most.
        policy: when memory is invoked; default: the adapter's own.
        metrics: where to count.
        options: further arguments for vLLM's engine, such as gpu_memory_utilization.

    Raises:
        KeepsightError: if vLLM is not installed, is another version, or does not serve this family.
    """

    wants_source, takes_videos = True, False
    unserved = ("response_format", "structured_outputs")  # vLLM's own would begin anew behind every memory

    def __init__(
        self,
        base: str,
        vismem: AdapterInfo,
        model: Any,
        tokenizer: Any,
        max_batch: int,
        most_tokens: int,
        policy: MemoryPolicy | None = None,
        metrics: Metrics | None = None,
        **options: Any,
    ):
        # `MemoryLimits` is tested as vLLM samples on a CPU: the second model runner, which GPUs get by default, refuses
        # logits processors of the first.
        prepare(VLLM_USE_V2_MODEL_RUNNER="0")
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        super().__init__(model, tokenizer, max_batch, metrics)
        self._folder = tempfile.TemporaryDirectory(prefix="keepsight-vllm-")
        folder = Path(self._folder.name) / "model"
        vocabulary = write_model(base, vismem, folder)
        defaults: dict[str, Any] = {
            "dtype": str(Backbone.of(model).model.dtype).removeprefix("torch."),
            "max_num_seqs": max_batch,
            "max_model_len": most_tokens,
            "mm_processor_cache_gb": 0,  # a request that is sent again brings its images again
            "async_scheduling": False,  # `MemoryLimits` counts what has been written
        }
        needed = {"enable_prompt_embeds": True, "logits_processors": [_LIMITS], "logprobs_mode": "raw_logprobs"}
        try:
            arguments = EngineArgs(model=str(folder), **(defaults | options | needed))
        except TypeError as error:
            raise KeepsightError(f"vLLM's engine does not take these arguments: {error}.") from None
        self.llm = LLMEngine.from_engine_args(arguments)
        self._batch = VllmBatch(self.llm, vocabulary, model, self.tokenizer, policy)

    def close(self, seconds: float | None = None) -> bool:
        """As `BatchEngine.close`; ends vLLM too."""
        stopped = super().close(seconds)
        self.llm.engine_core.shutdown()
        self._folder.cleanup()
        return stopped

    def _read(self, job: Job) -> None:
        self._batches = [self._batch]  # type: ignore[list-item]
        try:
            self._batch.begin(job)
        except Exception as error:
            self._fail(job, error)
            self.metrics.finished.labels("error").inc(job.choices)
            job.forget()
            return
        self.metrics.prompt_tokens.inc(job.prompt_tokens)

    def _drop(self, batch: Any, error: Exception) -> None:
        super()._drop(batch, error)
        with contextlib.suppress(Exception):  # vLLM may be what has failed
            self._batch.leave()
