"""Which files of a folder are a split: the hub's layout, folders of images with metadata, shards, or one file."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.images import PICTURES
from keepsight.data.tables.files import SUFFIXES, kind_of
from keepsight.errors import KeepsightWarning
from keepsight.words import some

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NOT_DATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "package.json",
    "config.json",
)
_DEEPEST = 3


def data_files(folder: Path, split: str, name: str) -> tuple[list[Path], tuple[str, ...]]:
    """The files of a split, in order, and what had to be decided to choose them.

    Args:
        folder: may hold a data file, shards of one (`train-00000-of-00002.parquet`), splits of both, all of it in
            folders (`data/`, `train/`), or images with a `metadata` file.
        split: the one wanted. A file belongs to the split that a README.md of the hub's form says, or else that its
            name or its folder names.
        name: of the folder, for messages.

    Raises:
        DataError: if there is no such split, if a shard is missing, or if there are files of several datasets.
    """
    found = _walk(folder, _DEEPEST)
    files = [path for path in found if kind_of(path) and path.name not in _NOT_DATA]
    beside_images = [path for path in files if path.name.partition(".")[0] == "metadata"]
    files = beside_images or files
    pictures = [path for path in found if path.suffix.lower() in PICTURES]
    beside = {path.with_suffix("") for path in pictures}
    if not files or (len(files) > 1 and all(path.with_suffix("") in beside for path in files)):
        raise DataError(_nothing(name, found, pictures))
    declared, notes = _declared(folder, name)
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    wanted = next((ours for ours, names in _SPLITS.items() if split in names), split)
    if declared:
        by_split, wanted = declared, split if split in declared else wanted
    chosen = by_split.get(wanted) or [path for path in files if wanted in _words(path.relative_to(folder))]
    if not chosen and (wanted == "train" or set(by_split) == {""}):
        chosen = by_split.get("", [])
    if not chosen:
        there = ", ".join(sorted(key for key in by_split if key)) or "none with a name"
        raise DataError(f"{name} has no split {split!r}. It has: {there}.")
    shards = {(path.parent, re.sub(r"\d+", "#", path.name)) for path in chosen}
    if len(shards) > 1 and not declared:
        within = {path.parent for path in chosen}
        if len(within) > 1 and len(within) == len(shards):
            folders = some(sorted(str(parent.relative_to(folder)) for parent in within))
            raise DataError(f"{name} holds several datasets ({folders}); name one of these folders.")
        names = some(str(path.relative_to(folder)) for path in chosen)
        raise DataError(f"{name} holds {len(chosen)} data files ({names}); name one of them.")
    _check_shards(chosen, name)
    return sorted(chosen, key=_by_number), notes


def _walk(folder: Path, deep: int) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            found += _walk(path, deep - 1) if deep else []
        else:
            found.append(path)
    return found


def _words(path: Path) -> set[str]:
    """Words of a relative path: split names stand between separators."""
    return {
        word for part in (*path.parts[:-1], path.name.partition(".")[0]) for word in re.split(r"[\W_]+", part.lower())
    }


def _split_of(path: Path) -> str:
    words = _words(path)
    return next((ours for ours, names in _SPLITS.items() if words & set(names)), "")


def _check_shards(files: list[Path], name: str) -> None:
    numbered = [re.search(r"(\d+)-of-(\d+)", path.name) for path in files]
    if not all(numbered):
        return
    total = int(numbered[0][2])  # type: ignore[index]
    missing = sorted(set(range(total)) - {int(match[1]) for match in numbered if match})
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of {total} shards are missing (number {some(missing)}). Download it again, or "
            "name the files that are there one by one."
        )


def _by_number(path: Path) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", path.as_posix())]


def _declared(folder: Path, name: str) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Split -> files, as a README.md of the hub's form declares them, and what was decided; empty where it does not.

    Raises:
        DataError: if it declares several datasets, and not which one is meant.
    """
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    header = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if header is None:
        return {}, ()
    import yaml

    try:
        configs = (yaml.safe_load(header[1]) or {}).get("configs") or []
        several = {str(config.get("config_name", "default")): config for config in configs if config.get("data_files")}
        default = [one for one, config in several.items() if one == "default" or config.get("default")]
        if len(several) > 1 and len(default) != 1:
            raise DataError(
                f"The header of {readme} declares {len(several)} datasets ({some(several)}), and "
                f"{'several' if default else 'none'} of them as the default. Name the file or the folder of the one "
                f"that is meant in place of {name}; or write `default: true` beside its config_name, and at no other."
            )
        if not several:
            return {}, ()
        chosen = default[0] if default else next(iter(several))
        found = _splits(several.pop(chosen), folder)
    except DataError:
        raise
    except (yaml.YAMLError, AttributeError, KeyError, IndexError, TypeError, ValueError, NotImplementedError) as error:
        warnings.warn(
            f"The header of {readme} cannot be read as the hub's ({' '.join(str(error).split())[:120]}), so what "
            "it says of splits and files is not used; they are told by their names. Expected is, between two lines of "
            "---: configs: [{config_name: default, data_files: [{split: train, path: data/train-*.parquet}]}].",
            KeepsightWarning,
            stacklevel=2,
        )
        return {}, ()
    return found, (f"{chosen!r}, the default in README.md; not used: {some(several)}",) if several else ()


def _splits(config: Any, folder: Path) -> dict[str, list[Path]]:
    """Split -> files of one dataset that a README.md declares."""
    folder, files = folder / config.get("data_dir", ""), config["data_files"]
    entries = files if isinstance(files, list) and isinstance(files[0], dict) else [{"path": files}]
    found = {}
    for entry in entries:
        patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        paths = {path for pattern in patterns for path in folder.glob(pattern) if kind_of(path)}
        if paths:
            found[str(entry.get("split", "train"))] = sorted(paths)
    if not found:
        raise ValueError(f"no file is there of {some(str(entry['path']) for entry in entries)}")
    return found


def _nothing(name: str, found: list[Path], pictures: list[Path]) -> str:
    keys = {path.with_suffix("") for path in pictures}
    words = [path for path in found if path.with_suffix("") in keys and path not in pictures]
    if words:
        return (
            f"{name} holds pictures with a file of words for each ({pictures[0].name}, {words[0].name}). Write them "
            f'into one metadata.jsonl beside the pictures, a line for each: {{"file_name": "{pictures[0].name}", '
            '"text": ...}.'
        )
    if pictures:
        return (
            f"{name} holds no dataset: {len(pictures):,} pictures and no words to them. Write a metadata.csv beside "
            "them, with the columns file_name,question,answer."
        )
    saved = [path.parent for path in found if path.name in ("dataset_dict.json", "state.json")]
    if saved:
        outer = min(saved, key=lambda one: len(one.parts))
        return f"{name} holds a dataset that Dataset.save_to_disk wrote: name its folder, {outer}."
    packed = [path.name for path in found if path.suffix.lower() in (".tar", ".zip", ".tgz", ".zst", ".arrow")]
    return (
        f"{name} holds no dataset: neither what Dataset.save_to_disk writes, nor metadata.jsonl beside images, nor a "
        f"{', '.join(SUFFIXES)} file." + (f" It holds {some(packed)}: unpack that first." if packed else "")
    )
