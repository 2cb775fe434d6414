"""Samples as rows of the trainer's dataset, and back to what a processor takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.images import ImageError, MissingImageError, find_image, is_base64, open_image
from keepsight.data.samples import images_in
from keepsight.data.tables.files import import_datasets
from keepsight.data.tables.reading import Source


def check_images(sample: dict[str, Any], folders: tuple[Path, ...], decode: bool) -> list[Any] | None:
    """Resolve relative paths in place; the images opened, where they are to be."""
    opened = []
    for index, item in enumerate(sample["images"]):
        try:
            if isinstance(item, dict) and not item.get("bytes") and item.get("path"):
                item = item["path"]
            if isinstance(item, (str, Path)) and not is_base64(item):
                item = str(find_image(item, *folders).resolve())
            if decode:
                opened.append(open_image(item))
            sample["images"][index] = item
        except ImageError as error:
            elsewhere = isinstance(error, MissingImageError) and "--image-folder" not in str(error)
            hint = "If pictures are in another folder: --image-folder FOLDER." if elsewhere else ""
            raise DataError(f"images[{index}]: {error}", hint) from error
    return opened if decode else None


def as_row(sample: dict[str, Any], row: int) -> dict[str, Any]:
    """A sample as a row of the trainer's dataset.

    Files are kept by their path; everything else by its place in the source, so that no image bytes are copied.
    Messages and other columns are JSON text, because Arrow would give every part every other part's keys, and chat
    templates ask for their presence.
    """
    cells = [
        {"path": item, "row": None, "index": None}
        if isinstance(item, str) and not is_base64(item)
        else {"path": None, "row": row, "index": index}
        for index, item in enumerate(sample["images"])
    ]
    columns = {name: value for name, value in sample.items() if name not in ("messages", "images")}
    return {"messages": json.dumps(sample["messages"]), "images": cells, "columns": json.dumps(columns)}


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    """A `datasets.Dataset`, which is what TRL's trainers take, of what `as_row` made."""
    datasets = import_datasets()
    number, text = datasets.Value("int64"), datasets.Value("string")
    features = datasets.Features(
        {"messages": text, "images": [{"path": text, "row": number, "index": number}], "columns": text}
    )
    return datasets.Dataset.from_list(rows, features=features)


def read_sample(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A row of `CheckedData.dataset`, ready for a processor: messages as lists of parts, images as PIL, other columns.

    Raises:
        ImageError: if a file has vanished or changed since it was checked.
    """
    stored: dict[int, list[Any]] = {}
    images = []
    for cell in row["images"]:
        item = cell["path"]
        if item is None:
            place = cell["row"]
            if place not in stored:
                stored[place] = images_in(*source.at(place))
            item = stored[place][cell["index"]]
        images.append(open_image(item))
    return {**json.loads(row.get("columns") or "{}"), "messages": json.loads(row["messages"]), "images": images}
