"""What ships with keepsight, by name: a small model, which adapters record instead of a path, and its memories."""

from __future__ import annotations

from pathlib import Path

REFERENCE_NAME = "keepsight/reference"
PVM_NAME = "keepsight/reference-pvm"
"""The PVM for the reference VLM that `keepsight demo` trains, with seed 0."""
VISMEM_NAME = "keepsight/reference-vismem"
"""A VisMem for the reference VLM, trained in the lab through both stages."""
IMAGE_NAME = "keepsight/digits.png"
"""A grid of handwritten digits, as the reference VLM reads it."""
SHIPPED_NAMES = (REFERENCE_NAME, PVM_NAME, VISMEM_NAME)
_FOLDER = Path(__file__).parent / "lab" / "weights" / "reference"


def reference_path() -> Path:
    """Folder of the shipped reference VLM.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    if not (_FOLDER / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"The reference VLM's weights are not at {_FOLDER}. Reinstall keepsight, or make one: "
            "keepsight lab pretrain -o DIR"
        )
    return _FOLDER


def resolve_base(name: str | Path) -> str | Path:
    """Where a recorded base is: the shipped model by its name (on whatever machine it was recorded), else `name`."""
    recorded = str(name)
    is_shipped = recorded == REFERENCE_NAME or Path(recorded).parts[-4:] == ("keepsight", *_FOLDER.parts[-3:])
    return reference_path() if is_shipped else name


def resolve_adapter(name: str | Path) -> str | Path:
    """Where an adapter is: a shipped memory by its name, else `name`."""
    folder = {PVM_NAME: "pvm", VISMEM_NAME: "vismem"}.get(str(name))
    return name if folder is None else _FOLDER.parent / folder


def portable_name(base: str | None) -> str | None:
    """What to record for a base: the name of the shipped model for its folder, else `base`."""
    return REFERENCE_NAME if base is not None and Path(base) == _FOLDER else base


def resolve_image(name: str | Path) -> str | Path:
    """Where an image is: the shipped one by its name, else `name`."""
    return Path(__file__).parent / "lab" / "digits.png" if str(name) == IMAGE_NAME else name
