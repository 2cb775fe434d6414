"""Which architecture of vLLM serves which family, and what it is called once it carries a memory."""

from __future__ import annotations

from dataclasses import dataclass

#: The minor versions of vLLM that this is written against and tested with, oldest first: plugins rest on internals.
SUPPORTED_VLLM = ("0.32", "0.33")

#: Key of config.json under which an export keeps the memory's resolved configuration.
CONFIG_KEY = "keepsight_pvm"

#: Name of the memory's weights file in an export, and of its tensors' module in a decoder layer.
MEMORY_FILE, MEMORY_MODULE = "keepsight_memory.safetensors", "visual_memory"

#: VisMem's four special tokens: key of config.json, weights file, and the module that holds their rows.
ROWS_KEY, ROWS_FILE, ROWS_MODULE = "keepsight_vismem", "keepsight_tokens.safetensors", "memory_rows"


@dataclass(frozen=True)
class ServedFamily:
    """A family as vLLM knows it.

    Attributes:
        name: what people call the family.
        base: vLLM's architecture, as `architectures` of the base's config.json names it.
        module: where vLLM keeps its class.
        class_name: that class, where it is called otherwise.
        frames_images: whether vLLM writes the tokens around an image as well, where it finds the image's own.
        rename: (pattern, replacement) for names of weights that transformers 5 saves and vLLM does not know.
    """

    name: str
    base: str
    module: str
    class_name: str = ""
    frames_images: bool = False
    rename: tuple[str, str] | None = None

    @property
    def architecture(self) -> str:
        """Our architecture: vLLM's with a visual memory (PVM)."""
        return f"Keepsight{self.base}"

    @property
    def latent_architecture(self) -> str:
        """Our architecture: vLLM's with the special tokens of latent memories (VisMem)."""
        return f"KeepsightLatent{self.base}"


_MODELS = "vllm.model_executor.models."

#: `config.model_type` -> how vLLM serves it.
SERVED: dict[str, ServedFamily] = {
    "qwen3_vl": ServedFamily("Qwen3-VL", "Qwen3VLForConditionalGeneration", _MODELS + "qwen3_vl"),
    "qwen2_5_vl": ServedFamily("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", _MODELS + "qwen2_5_vl"),
    "qwen3_5": ServedFamily("Qwen3.5", "Qwen3_5ForConditionalGeneration", _MODELS + "qwen3_5"),
    "internvl": ServedFamily(
        "InternVL",
        "InternVLForConditionalGeneration",
        _MODELS + "interns1",
        "InternS1ForConditionalGeneration",
        frames_images=True,
    ),
    "llava_onevision": ServedFamily(
        "LLaVA-OneVision",
        "LlavaOnevisionForConditionalGeneration",
        _MODELS + "llava_onevision",
        rename=(r"^((?:model\.)?vision_tower)\.(?!vision_model\.)", r"\1.vision_model."),
    ),
}
