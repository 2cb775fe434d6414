"""The generated text token by token, its memories in place, and heat maps over the image."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from keepsight.diagnose.instruments.layout import VisualLayout
from keepsight.diagnose.results import Diagnosis, Written
from keepsight.words import counted

PICTURE = 640  # longest side of an embedded picture, in pixels


def layout_of(written: Written | None) -> VisualLayout | None:
    """Where the visual tokens of the first output lie; None if there are none."""
    if written is None or not written.attention or not written.attention[0].layouts:
        return None
    layout = written.attention[0].layouts[0]
    return layout if len(layout.slots) else None


def views_of(diagnosis: Diagnosis, layout: VisualLayout | None) -> list[dict[str, Any]]:
    """What can be laid over the image: (name, verb, weights [S, cells])."""
    written = diagnosis.written
    if written is None or layout is None:
        return []
    views = []
    retrieval = diagnosis.retrieval
    if retrieval is not None:
        rows = [("the memory", retrieval.weights.mean(1))]
        if len(retrieval.layers) > 1:
            rows += [(f"memory at layer {i}", retrieval.weights[:, k]) for k, i in enumerate(retrieval.layers)]
        views += [_view(name, "retrieved:", weights, layout) for name, weights in rows]
    where = written.attention[0].where
    if where is not None and where.shape[1] == len(layout.slots):
        share = where / np.maximum(where.sum(1, keepdims=True), 1e-30)
        views.append(_view("the model's own attention", "its own attention:", share, layout))
    return views


def _view(name: str, verb: str, weights: np.ndarray, layout: VisualLayout) -> dict[str, Any]:
    cells = np.concatenate([grid.reshape(len(weights), -1) for grid in layout.maps(weights)], 1)
    peak = weights.max(1)
    scale = np.maximum(cells.max(1, keepdims=True, initial=0), 1e-30)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(weights > 0, weights * np.log(weights), 0).sum(1)
    return {
        "name": name,
        "verb": verb,
        "weights": base64.b64encode((cells / scale * 255).round().astype(np.uint8).tobytes()).decode(),
        "peak": [round(100 * float(p), 1) for p in peak],
        "spread": [round(float(np.exp(e)), 1) for e in entropy],
    }


@dataclass(frozen=True)
class Picture:
    """An image, or a part of a video, and the grid [height, width] of its visual tokens (0 if it is not known)."""

    name: str
    what: str
    source: str
    width: int
    height: int
    rows: int
    columns: int

    @property
    def tiny(self) -> bool:
        """So small that its pixels should be seen."""
        return max(self.width, self.height) < 128


def pictures(diagnosis: Diagnosis, layout: VisualLayout | None) -> list[Picture]:
    """Every image, and every part of a video that has visual tokens of its own."""
    found = []
    for index, picture in enumerate(diagnosis.images):
        item = layout.items[index] if layout is not None and index < len(layout.items) else None
        frames = picture if isinstance(picture, list) else [picture]
        count = item.frames if item is not None else 1
        rows, columns = (item.height, item.width) if item is not None and item.height > 0 else (0, 0)
        for frame in range(count):
            image = frames[min(len(frames) - 1, frame * len(frames) // count)]
            name = f"image {index + 1}" if not isinstance(picture, list) else f"video {index + 1}, part {frame + 1}"
            grid = f"{rows} x {columns} visual tokens" if rows else "no grid of visual tokens known"
            what = f"{image.width} x {image.height} pixels, {grid}"
            found.append(Picture(name, what, _picture(image), image.width, image.height, rows, columns))
    return found


def _picture(image: Any) -> str:
    shrunk = image.convert("RGB")
    shrunk.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    small = shrunk.width * shrunk.height <= 128 * 128
    shrunk.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def elements_of(written: Written) -> list[tuple[str, int]]:
    """What the text consists of, in order: ("token", i) and ("memory", j)."""
    found: list[tuple[str, int]] = []
    left = list(range(len(written.memories)))
    for i in range(len(written.words) + 1):
        while left and written.memories[left[0]].place <= i:
            found.append(("memory", left.pop(0)))
        if i < len(written.words):
            found.append(("token", i))
    return found


@dataclass(frozen=True)
class Mark:
    """A token of the text as it was written, shaded from 0 to 1 by how much the model looked; or a memory."""

    text: str
    shade: float = 0.0
    memory: str = ""


def marks(written: Written | None) -> list[Mark]:
    """The text, token by token, memories where they stand."""
    if written is None:
        return []
    mass = mass_of(written)
    shade = np.zeros(len(written.words))
    if mass.size and np.nanmax(mass) > 0:
        log = np.log(np.maximum(mass, 1e-9))
        low, high = np.log(max(np.nanmin(mass[mass > 0]), 1e-4)), log.max()
        shade = np.clip((log[_steps(written)] - low) / max(high - low, 1e-9), 0, 1)
    return [
        Mark(written.memories[i].kind, memory=written.memories[i].kind)
        if what == "memory"
        else Mark(written.words[i].replace("\n", "\u23ce\n") or "\u200b", float(shade[i]))
        for what, i in elements_of(written)
    ]


def mass_of(written: Written) -> np.ndarray:
    """Mean over layers and heads [S] of the first trace's first row."""
    return written.attention[0].mass[:, :, 0].mean((1, 2))


def _steps(written: Written) -> np.ndarray:
    """For every token, the measured step that belongs to it [n] (the last one before it)."""
    steps = written.attention[0].steps
    return np.clip(np.searchsorted(steps, written.slots, "right") - 1, 0, len(steps) - 1)


def data(diagnosis: Diagnosis, views: list[dict[str, Any]], layout: VisualLayout | None) -> dict[str, Any]:
    """What the page's script needs."""
    written, off = diagnosis.written, diagnosis.written_off
    if written is None:
        return {"views": [], "step": [], "index": [], "mass": [], "off": [], "memories": {}, "cells": 0, "visual": 0}
    mass, steps = mass_of(written), _steps(written).tolist()
    has_mass = layout is not None
    elements = elements_of(written)
    last = len(steps) - 1
    memory = np.nanmean(written.attention[0].memory_mass[:, :, 0], (1, 2))
    return {
        "views": views,
        "cells": sum(item.frames * item.height * item.width for item in layout.items) if layout is not None else 0,
        "visual": len(layout.slots) if layout is not None else 0,
        # a memory has no prediction of its own: it shows what the next token looked at
        "step": [steps[min(_next_token(elements, n), last)] if steps else 0 for n in range(len(elements))],
        "index": [i for _, i in elements],
        "mass": [round(float(m), 5) if has_mass else None for m in mass],
        "off": _off(written, off) if off is not None and has_mass else [],
        "latents": [round(float(m), 5) for m in memory] if written.memories else [],
        "memories": {n: _memory(written, i, layout) for n, (what, i) in enumerate(elements) if what == "memory"},
        "most": round(float(mass.max()), 5),
    }


def _off(written: Written, off: Written) -> list[float]:
    """For every measured step, the mass at the same word of the output without the memory."""
    mass, steps = mass_of(off), off.attention[0].steps
    words = np.searchsorted(written.slots, written.attention[0].steps)
    places = np.clip(np.searchsorted(steps, words, "right") - 1, 0, len(steps) - 1)
    return [round(float(mass[place]), 5) for place in places]


def _next_token(elements: list[tuple[str, int]], number: int) -> int:
    return next((i for what, i in elements[number:] if what == "token"), 10**9)


def _memory(written: Written, which: int, layout: VisualLayout | None) -> dict[str, Any]:
    formed = written.memories[which]
    by = "the model" if formed.chosen else "the policy"
    found: dict[str, Any] = {
        "text": f"{formed.kind}-term memory, {counted(formed.latents, 'latent')}, invoked by {by} after "
        f"{counted(formed.place, 'token')}"
    }
    forming = written.forming[which] if which < len(written.forming) else None
    if forming is not None:
        found["look"] = (
            f"while formed it gave the image {100 * float(forming.image.mean()):.0f} % of its attention "
            f"(evenly spread: {100 * forming.uniform:.0f} %)"
        )
        if forming.where is not None and layout is not None and forming.where.shape[1] == len(layout.slots):
            cells = np.concatenate([grid.reshape(-1) for grid in layout.maps(forming.where.mean(0))])
            shade = (cells / max(float(cells.max()), 1e-30) * 255).round().astype(np.uint8)
            found["map"] = base64.b64encode(shade.tobytes()).decode()
    return found
