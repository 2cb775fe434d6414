"""From any picture that Pillow holds to the RGB that a browser would show: what every model here is given.

The one place where transparency, depth, rotation and frames are decided, for training, generation, serving and the
diagnosis alike. Colour profiles are not applied: vision encoders were trained on pixels as they are stored.
"""

from __future__ import annotations

from typing import Any

from keepsight.errors import KeepsightError

#: Formats whose further frames are other views of one picture (a phone's depth map, a document's layers).
_ONE_PICTURE = ("MPO", "PSD")
#: TIFF's BitsPerSample and PhotometricInterpretation.
_BITS, _PHOTOMETRIC = 258, 262


class ImageError(KeepsightError):
    """A file is missing, is no image, is damaged, or is no single picture."""


def as_seen(image: Any) -> Any:
    """A picture as a browser shows it on a white page.

    - Turned upright as its EXIF data say.
    - Transparency, of any kind (an alpha channel, a transparent colour, a palette with either), lies on white.
    - Greyscale of more than eight bits is scaled to eight: 16-bit modes by their range (that of the file, which may
      have 12 bits); whole numbers and floats by the smallest usual range that holds them (0 to 1 for floats, 0 to 255,
      0 to 65,535), else from their lowest value to their highest. Where a TIFF says that zero is white, it is.

    Args:
        image: a PIL image of any mode.

    Returns:
        A PIL image in RGB, of one frame.

    Raises:
        ImageError: if it has several frames, no pixels, or values that are no numbers.
    """
    from PIL import Image, ImageOps

    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _ONE_PICTURE:
        raise ImageError(
            f"it has {frames} frames, and a picture is one. Save the frame you mean as a file of its own; for a video "
            "give its frames in order."
        )
    if 0 in image.size:
        raise ImageError(f"it has no pixels ({image.width} x {image.height}).")
    white, zero_is_white, clear = _told_by_the_file(image)
    image = ImageOps.exif_transpose(image)
    if clear is not None:
        image.info["transparency"] = clear
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, white, zero_is_white)
    if image.mode == "LAB":
        image = _from_lab(image)
    if image.has_transparency_data:
        # premultiplied colours are divided out first, in their own mode
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def from_array(array: Any) -> Any:
    """A PIL image of an array's pixels.

    Args:
        array: numpy's or torch's, of whole numbers from 0 to 255: [H, W] or [H, W, 1] (grey), [H, W, 3] (RGB) or
            [H, W, 4] (RGBA).

    Raises:
        ImageError: for any other, whose pixels could be meant in several ways.
    """
    import numpy as np
    from PIL import Image

    pixels = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    if np.issubdtype(pixels.dtype, np.integer) and pixels.size and pixels.min() >= 0 and pixels.max() <= 255:
        pixels = pixels.astype(np.uint8)
    if (
        not pixels.size
        or pixels.dtype != np.uint8
        or pixels.ndim not in (2, 3)
        or pixels.shape[2:] not in ((), (1,), (3,), (4,))
    ):
        raise ImageError(
            f"an array of {pixels.dtype} {list(pixels.shape)}; expected uint8 [height, width], or [height, width, "
            "channels] with 1, 3 or 4 channels (grey, RGB, RGBA). Shares from 0 to 1 become that by (x * 255).round() "
            "as uint8; channels that stand first are moved behind by numpy's moveaxis(x, 0, -1), torch's permute(1, 2, "
            "0)."
        )
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)


def _told_by_the_file(image: Any) -> tuple[float | None, bool, int | None]:
    """What Pillow's pixels do not say; to be asked before they are read.

    Returns:
        The value of white, if it is known; whether zero is white and Pillow leaves it so; and the transparent grey of
        a PNG of two or four bits, whose pixels Pillow scales to eight, and this not.
    """
    tags, info = getattr(image, "tag_v2", {}), image.info  # a TIFF's
    white, grey = None, info.get("transparency")
    if image.mode.startswith("I;16"):
        white = 2.0 ** int(tags.get(_BITS, (16,))[0]) - 1
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        white = 65535.0
    raw = next((tile[3] for tile in getattr(image, "tile", ())), None) if image.format == "PNG" else None
    step = {"L;2": 85, "L;4": 17}.get(raw) if isinstance(raw, str) and isinstance(grey, int) else None
    return white, tags.get(_PHOTOMETRIC) == 0, None if step is None else grey * step


def _eight_bits(image: Any, white: float | None, zero_is_white: bool) -> Any:
    """Greyscale of whole numbers or floats as L, or LA where a value stands for "transparent"."""
    import numpy as np  # the command line looks at names of pictures without it
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("it holds values that are no numbers (NaN or infinite). Replace them before saving it.")
    low, high = float(values.min()), float(values.max())
    if white is not None:
        pass
    elif low >= 0 and high <= 1 and image.mode == "F":
        white = 1.0
    else:
        white = next((limit for limit in (255.0, 65535.0) if low >= 0 and high <= limit), 0.0)
    shown = (values / white).clip(0, 1) if white else (values - low) / ((high - low) or 1.0)
    grey = Image.fromarray(((1 - shown if zero_is_white else shown) * 255).round().astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey
    alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _from_lab(image: Any) -> Any:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
