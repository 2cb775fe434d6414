"""Any picture: what the model sees is what a browser shows, for every mode and format that Pillow writes."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence, features

from keepsight.data.images import ImageError, open_image
from keepsight.data.pixels import as_seen
from keepsight.serve.errors import ApiError
from keepsight.serve.openai.images.decode import FORMATS, decode_image
from keepsight.serve.openai.settings import Limits

SIDE = 16
MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
    "La",
    "RGBa",
)
LOSSY = {"JPEG", "JPEG2000", "WEBP", "AVIF", "MPO", "GIF", "BLP", "PDF", "SPIDER"}
NO_PICTURES = {
    "PDF",
    "XBM",
    "ICNS",
    "ICO",
    "PALM",
    "BUFR",
    "GRIB",
    "HDF5",
    "WMF",
    "EPS",
}  # documents, masks, fixed sizes


def colours() -> Image.Image:
    """Four flat quarters, so that lossy formats keep their middles."""
    image = Image.new("RGBA", (SIDE, SIDE))
    half = SIDE // 2
    for place, colour in zip(((0, 0), (half, 0), (0, half), (half, half)), COLOURS, strict=True):
        image.paste(colour, (*place, place[0] + half, place[1] + half))
    return image


COLOURS = ((255, 0, 0, 255), (0, 0, 255, 255), (20, 180, 60, 0), (40, 40, 40, 0))


def in_mode(mode: str) -> tuple[Image.Image, np.ndarray]:
    """A picture of a mode, and what is to be seen of its quarters [2, 2, 3]."""
    image = colours()
    if mode in ("I", "F", "I;16", "I;16B"):
        grey = np.repeat(np.repeat(np.array([[0, 21845], [43690, 65535]]), SIDE // 2, 0), SIDE // 2, 1)
        kind = {"I": np.int32, "F": np.float32}.get(mode, np.uint16)
        picture = Image.fromarray((grey / 65535 if mode == "F" else grey).astype(kind))
        shown = np.array([[0, 85], [170, 255]])[..., None].repeat(3, -1)
        return (picture if mode != "I;16B" else picture.convert("I").convert("I;16B")), shown
    clear = mode in ("LA", "PA", "RGBA", "La", "RGBa")
    opaque = image.convert("RGB")
    if mode == "PA":
        picture = opaque.quantize(8).convert("PA")
        picture.putalpha(image.getchannel("A"))
    elif mode == "P":
        picture = opaque.quantize(8)
    elif mode in ("La", "RGBa"):
        picture = image.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode == "HSV":
        picture = opaque.convert("HSV")
    else:
        picture = (image if clear else opaque).convert(mode)
    grey = mode in ("1", "L", "LA", "La")
    seen = opaque.convert("L" if mode != "1" else "1").convert("RGB") if grey else opaque
    shown = quarters(seen).astype(int)
    if clear:
        shown[1] = 255
    return picture, shown


def quarters(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))[[SIDE // 4, 3 * SIDE // 4]][:, [SIDE // 4, 3 * SIDE // 4]].astype(int)


def check(seen: Image.Image, shown: np.ndarray, tolerance: int) -> None:
    assert seen.mode == "RGB"
    assert abs(quarters(seen) - shown).max() <= tolerance, f"{quarters(seen).tolist()} for {shown.tolist()}"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_memory(mode: str) -> None:
    picture, shown = in_mode(mode)
    check(open_image(picture), shown, 8 if mode in ("1", "HSV", "YCbCr") else 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_an_array_is_its_picture_or_a_lesson(mode: str) -> None:
    """uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], of numpy or torch; of others nobody knows which is meant."""
    picture, shown = in_mode(mode)
    pixels = np.asarray(picture)
    same = [pixels, torch.from_numpy(pixels.copy()), pixels.astype(int), *([pixels[..., None]] if mode == "L" else [])]
    for array in same:
        check(open_image(array), shown, 1)
    channels_first = pixels[None] if mode == "L" else np.moveaxis(pixels, -1, 0)
    for array in (pixels / 255.0, same[2] - 300, same[2] + 300, channels_first, pixels[None, None], pixels[:0]):
        for given in (array, torch.from_numpy(array.copy())):
            with pytest.raises(ImageError, match=r"this array: .*expected uint8"):
                open_image(given)


@pytest.mark.parametrize("empty", [b"", "", {"bytes": b"", "path": None}, {"path": None}], ids=repr)
def test_an_image_of_nothing_is_a_lesson(empty: Any) -> None:
    with pytest.raises(ImageError, match="without bytes and without a file's name"):
        open_image(empty)


def written() -> list[tuple[str, str]]:
    Image.init()
    found = []
    for name in sorted(set(Image.SAVE) & set(Image.OPEN) - NO_PICTURES):
        for mode in MODES:
            buffer = io.BytesIO()
            try:
                in_mode(mode)[0].save(buffer, name)
                with Image.open(io.BytesIO(buffer.getvalue())) as again:
                    clear, depth = again.has_transparency_data, again.mode
            except Exception:
                continue  # Pillow does not write this mode in this format
            drops_alpha = mode in ("LA", "PA", "RGBA", "La", "RGBa") and not clear
            clips = mode in ("I", "I;16", "I;16B", "F") and not depth.startswith(("I", "F"))
            if not drops_alpha and not clips:  # what Pillow did not write cannot be seen
                found.append((name, mode))
    return found


@pytest.mark.parametrize(("name", "mode"), written(), ids=lambda part: part)
def test_every_mode_in_every_format(name: str, mode: str) -> None:
    picture, shown = in_mode(mode)
    buffer = io.BytesIO()
    picture.save(buffer, name)
    with Image.open(io.BytesIO(buffer.getvalue())) as again:
        if again.mode in ("L", "LA", "1", "F") and np.ptp(shown, -1).any():  # a format of grey pictures
            weights = np.array([0.299, 0.587, 0.114])
            shown = (shown @ weights).round().astype(int)[..., None].repeat(3, -1)
    tolerance = 16 if name in LOSSY or mode in ("1", "HSV", "YCbCr") else 1
    check(open_image(buffer.getvalue()), shown, tolerance)
    if name in FORMATS:
        check(decode_image(buffer.getvalue(), Limits(), "image"), shown, tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_from_a_file_and_from_memory(orientation: int) -> None:
    raw = Image.fromarray(np.arange(SIDE * SIDE * 2, dtype=np.uint8).reshape(SIDE, 2 * SIDE))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    raw.save(buffer, "PNG", exif=exif)
    seen = open_image(buffer.getvalue())
    assert seen.size == (raw.size if orientation < 5 else raw.size[::-1])
    assert seen.tobytes() == open_image(Image.open(io.BytesIO(buffer.getvalue()))).tobytes()
    assert seen.tobytes() == as_seen(seen).tobytes(), "turned once, not twice"


def test_one_transparent_colour() -> None:
    for mode, clear in (("L", 255), ("RGB", (255, 0, 0)), ("I;16", 65535)):
        values = np.zeros((SIDE, SIDE), np.uint16) if mode == "I;16" else None
        picture = Image.fromarray(values) if values is not None else Image.new(mode, (SIDE, SIDE))
        picture.paste(clear, (0, 0, SIDE // 2, SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", transparency=clear)
        seen = quarters(open_image(buffer.getvalue()))
        assert seen[:, 0].min() == 255, mode
        assert seen[:, 1].max() == 0, mode


def test_values_beyond_the_usual_ranges() -> None:
    wide = Image.fromarray(np.linspace(-40, 2000, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE))
    seen = np.asarray(open_image(wide))
    assert (seen.min(), seen.max()) == (0, 255)
    dark = Image.fromarray(np.full((SIDE, SIDE), 200, np.uint16))
    assert np.asarray(open_image(dark)).max() == 1, "sixteen bits are scaled by their range, not by what is used of it"
    eight = Image.fromarray(np.full((SIDE, SIDE), 200, np.int32))
    assert np.asarray(open_image(eight)).max() == 200
    with pytest.raises(ImageError, match="NaN"):
        open_image(Image.fromarray(np.full((SIDE, SIDE), np.nan, np.float32)))
    with pytest.raises(ImageError, match="no pixels"):
        open_image(Image.new("RGB", (0, 3)))


def tiff(picture: Image.Image, **tags: int) -> bytes:
    """A TIFF as Pillow writes it, with other values of its tags: `t258=12`."""
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF")
    content = bytearray(buffer.getvalue())
    start = struct.unpack_from("<I", content, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        value = tags.get(f"t{struct.unpack_from('<H', content, entry)[0]}")
        if value is not None:
            struct.pack_into("<H", content, entry + 8, value)
    return bytes(content)


@pytest.mark.parametrize("mode", ["L", "I;16", "F"])
def test_a_tiff_in_which_zero_is_white(mode: str) -> None:
    ramp = np.linspace(0, 1, SIDE).repeat(SIDE).reshape(SIDE, SIDE)
    scale, kind = {"L": (255, np.uint8), "I;16": (65535, np.uint16), "F": (1, np.float32)}[mode]
    picture = Image.fromarray((ramp * scale).astype(kind))
    plain, turned = (np.asarray(open_image(tiff(picture, t262=value))).astype(int) for value in (1, 0))
    assert (plain[0, 0, 0], plain[-1, 0, 0]) == (0, 255)
    assert abs(255 - plain - turned).max() <= 1


def test_a_tiff_of_twelve_bits() -> None:
    """Pillow reads its values into sixteen bits as they are."""
    row = b"".join(bytes([v >> 4, (v & 15) << 4 | v >> 8, v & 255]) for v in (4095,) * (SIDE // 2))
    sixteen = tiff(Image.new("I;16", (SIDE, SIDE)))
    content = bytearray(tiff(Image.new("I;16", (SIDE, SIDE)), t258=12))
    with Image.open(io.BytesIO(sixteen)) as image:
        offset = image.tile[0].offset
    content[offset : offset + len(row) * SIDE] = row * SIDE
    with Image.open(io.BytesIO(bytes(content))) as image:
        assert image.tile[0].args[0] == "I;12"
    assert np.asarray(open_image(bytes(content))).min() == 255


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_transparent_grey_of_few_bits(bits: int) -> None:
    """Optimized PNGs: Pillow scales the pixels to eight bits and leaves the transparent value as it is."""
    clear, other = 0, 2**bits - 1 if bits == 1 else 1

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    def row(value: int) -> bytes:
        return bytes([0] + [sum(value << shift for shift in range(0, 8, bits))] * (SIDE * bits // 8))

    for transparent, seen in ((clear, [255, other * 255 // (2**bits - 1)]), (other, [0, 255])):
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, 0, 0, 0, 0))
        content += chunk(b"tRNS", struct.pack(">H", transparent))
        content += chunk(b"IDAT", zlib.compress(row(clear) * (SIDE // 2) + row(other) * (SIDE // 2)))
        content += chunk(b"IEND", b"")
        for source in (content, Image.open(io.BytesIO(content))):
            assert quarters(open_image(source))[:, 0, 0].tolist() == seen
        assert quarters(decode_image(content, Limits(), "image"))[:, 0, 0].tolist() == seen


def lesson(source: object) -> str | None:
    try:
        open_image(source)
    except ImageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "moving GIF"])
def test_a_damaged_file_is_a_lesson_wherever_it_ends(name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2, SIDE, SIDE, 3), dtype=np.uint8)
    first, second = (Image.fromarray(one) for one in noise)
    buffer, more = io.BytesIO(), {"save_all": True, "append_images": [second]} if "moving" in name else {}
    first.save(buffer, name.split()[-1], **more)
    whole = buffer.getvalue()
    for length in range(1, len(whole), max(1, len(whole) // 50)):
        cut = whole[:length]
        told = lesson(cut)
        if told is None:  # nothing was missing but the end
            assert np.array_equal(np.asarray(open_image(cut)), np.asarray(open_image(whole)))
        else:
            assert told.startswith(f"these {length} bytes: ")
        try:
            opened = Image.open(io.BytesIO(cut))
        except Exception:
            continue  # Pillow's own words
        told = lesson(opened)
        assert told is None or told.startswith("this PIL image: ")


@pytest.mark.parametrize("name", ["GIF", "WEBP", "TIFF", "PNG"])
def test_several_frames_are_no_picture(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "green", "blue")]
    path = tmp_path / f"moving.{name.lower()}"
    frames[0].save(path, name, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"moving.*3 frames.*frames in order"):
        open_image(path)
    with Image.open(path) as moving:
        with pytest.raises(ImageError, match="3 frames"):
            open_image(moving)
        assert [as_seen(frame.copy()).mode for frame in ImageSequence.Iterator(moving)] == ["RGB"] * 3
    if name != "TIFF":
        with pytest.raises(ApiError, match="3 frames"):
            decode_image(path.read_bytes(), Limits(), "image")


def test_a_browser_shows_the_same() -> None:
    """`browser.json` holds what headless Chromium drew of these files on a white page, pixel by pixel of a 4 x 4 grid
    (made by `python tests/data/browser.py`)."""
    folder = Path(__file__).parent / "pictures"
    drawn = json.loads((folder / "browser.json").read_text())
    assert len(drawn) >= 12
    for name, expected in drawn.items():
        seen = np.asarray(open_image(folder / name))
        step_y, step_x = seen.shape[0] // 4, seen.shape[1] // 4
        grid = seen[step_y // 2 :: step_y, step_x // 2 :: step_x][:4, :4].astype(int)
        assert abs(grid - np.array(expected)).max() <= 3, name


def _as(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (_as("PDF"), "PDF"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "video"),
    ],
)
def test_what_is_no_picture_is_named_wherever_it_is_given(content: bytes, what: str) -> None:
    with pytest.raises(ImageError, match=what):
        open_image(content)
    with pytest.raises(ApiError, match=what):
        decode_image(content, Limits(), "p")


@pytest.mark.parametrize("kind", ["TIFF", "AVIF"])
def test_the_server_names_a_picture_of_a_format_that_it_does_not_take(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    with pytest.raises(ApiError, match=f"it is (a )?{kind}, so save it as PNG"):
        decode_image(_as(kind), Limits(), "p")
