"""One JSON object that holds a whole dataset: which of its values are the samples, and what else it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.images import is_picture_name
from keepsight.words import some


def samples_in(found: dict[str, Any], name: str) -> tuple[list[Any], tuple[str, ...]]:
    """(the samples that an object holds, what had to be decided to find them).

    They are its only list of objects; COCO's captions, each with its picture; objects under their ids; or texts under
    their pictures' names.

    Raises:
        DataError: naming what the object looks like.
    """
    if not found:
        raise DataError(f"{name} is empty: it holds no samples.")
    lists = [key for key, value in found.items() if _are_objects(value)]
    if {"images", "annotations"} <= set(lists):
        return _coco_captions(found["images"], found["annotations"], name)
    if {"questions", "data_subtype"} <= set(found) or {"annotations", "data_subtype"} <= set(found):
        raise DataError(
            f"{name} looks like one half of VQA v2: questions and answers stand in two files. Join them by "
            'question_id, and write one object for each: {"image": FILE, "question": ..., "answers": [...]}.'
        )
    if len(lists) == 1:
        others = [key for key in found if key != lists[0]]
        more = f"; beside it and not used: {some(others)}" if others else ""
        return found[lists[0]], (f"read from {lists[0]!r}{more}",)
    if len(lists) == len(found):
        raise DataError(f"{name} holds several lists of samples ({some(lists)}). Write each into a file of its own.")
    values = list(found.values())
    if all(isinstance(value, str) for value in values) and all(is_picture_name(key) for key in found):
        return [{"file_name": key, "text": value} for key, value in found.items()], (
            "a text under each picture's name",
        )
    if all(isinstance(value, dict) for value in values):
        if all({"root", "annotation"} <= set(value) for value in values):
            one = values[0]
            raise DataError(
                f"{name} names other files, as InternVL's training has it: give these, {one['annotation']} with "
                f"--image-folder {one['root']}."
            )
        if not all(key.isdigit() for value in values for key in value):  # else pandas' columns
            named = all(is_picture_name(key) for key in found)
            rows = [{"file_name": key, **value} for key, value in found.items()] if named else values
            return rows, (f"one sample under each key ({some(found)})" + ("" if named else ", and keys are not used"),)
    if len({len(value) for value in values if isinstance(value, (list, dict))}) == 1 and all(
        isinstance(value, (list, dict)) for value in values
    ):
        what = "columns, and expected are rows"
    else:
        what = f"one JSON object with the keys {some(found)}; expected a list of samples, or one object per line"
    raise DataError(f'{name} holds {what}. From pandas: df.to_json(FILE, orient="records", lines=True).')


def _coco_captions(images: Sequence[Any], annotations: Sequence[Any], name: str) -> tuple[list[Any], tuple[str, ...]]:
    files = {one.get("id"): one.get("file_name") for one in images}
    if not all("caption" in one and files.get(one.get("image_id")) for one in annotations):
        raise DataError(
            f"{name} looks like COCO annotations (images and annotations apart), and not of captions. Write one "
            'object per picture, such as {"image": FILE, "question": ..., "answer": ...}.'
        )
    rows = [{"file_name": files[one["image_id"]], "caption": one["caption"]} for one in annotations]
    return rows, (f"COCO captions: {len(rows):,} for {len(files):,} pictures",)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
