"""Columns that a sample is not made of, and that hold a part of it: nothing is lost in silence."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from keepsight.data.conversations import Chat
from keepsight.data.errors import DataError
from keepsight.data.formats import filled
from keepsight.data.images import holds_pictures, is_address, is_base64, is_of_pictures, is_picture_name

_MEANT = {  # columns whose loss would change what a sample says
    "videos": "videos; training reads pictures only: give frames as images",
    "video": "a video; training reads pictures only: give frames as images",
    "audios": "sound; training reads pictures only",
    "audio": "sound; training reads pictures only",
    "functions": 'functions; the form that chat templates know is "tools"',
    "weight": "a weight; samples count alike: repeat rows, or leave some out",
    "choices": "the choices of the question, which nobody would see: write them into the question",
    "options": "the options of the question, which nobody would see: write them into the question",
    "system_prompt": "a system message; --columns system=system_prompt uses it",
}


def refuse_preferences(row: dict[str, Any]) -> None:
    """Raise for a better and a worse answer, of which none is said to be the one."""
    if filled(row.get("chosen")) and filled(row.get("rejected")):
        raise DataError(
            "chosen, rejected: preferences (DPO), which are not trained on",
            "The better answers can be learned: --columns answer=chosen.",
        )


def refuse_loss(rest: dict[str, Any], chat: Chat, answered: bool) -> None:
    """Raise for columns that hold a part of the sample that would be lost.

    Args:
        rest: columns that the sample is not made of, and that hold something.
        chat: the sample's conversation.
        answered: whether answers are learned.

    Raises:
        DataError: naming the column.
    """
    images = chat.images
    letters = [name for name in "ABCDEFGHIJ" if name in rest]
    if letters[:2] == ["A", "B"]:  # VLMEvalKit's and MMBench's tables
        raise DataError(
            f"{letters[0]} to {letters[-1]}: {_MEANT['options']}", f"To do without: --ignore {','.join(letters)}."
        )
    for name, value in rest.items():
        what = _MEANT.get(name)
        if name == "tools" and not answered:
            what = "tools; a prompt is written without them here (reinforcement learning, diagnose, eval)"
        if name == "objects" and any(mark in json.dumps(chat.messages) for mark in ("<bbox>", "<ref-object>")):
            what = "boxes that <bbox> and <ref-object> stand for, which would be learned as words: write them out"
        if what is None and not images and _may_name_a_picture(name, value):
            download = "download it, and name its file in a column called image"
            what = "it seems to name a picture, and the sample has none: " + (
                download if isinstance(value, str) and is_address(value) else f"--columns image={name}"
            )
        if what is None and (holds_pictures(value) or _is_another_file(value, images)):
            what = (
                f"a second picture, which nobody would see; --columns image={name} takes it alone, "
                "--columns images=FIRST+SECOND both"
            )
        if what is not None:
            raise DataError(f"{name}: {what}", f"To do without {name}: --ignore {name}.")


def _may_name_a_picture(name: str, value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return all(_may_name_a_picture(name, one) for one in value)
    if not isinstance(value, str):
        return holds_pictures(value)
    return is_picture_name(value) or is_base64(value) or (is_address(value) and is_of_pictures(name))


def _is_another_file(value: Any, images: list[Any]) -> bool:
    """Whether it names the file of a picture that is none of the sample's."""
    files = [item.get("path") if isinstance(item, dict) and not item.get("bytes") else item for item in images]
    if not files or not all(isinstance(file, str) and not is_base64(file) for file in files):
        return False
    names = {PurePosixPath(str(file)).name for file in files}
    another = isinstance(value, str) and is_picture_name(value) and "://" not in value
    return another and PurePosixPath(value).name not in names
