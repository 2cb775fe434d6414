"""Videos that strangers send: frames, one by one or in one animated image.

Nothing here decodes film (MP4 and the like), whose decoders are large, external and a risk of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from keepsight.data.pixels import as_seen
from keepsight.serve.errors import bad, too_large
from keepsight.serve.openai.images.decode import check_bytes, decode_image, opened
from keepsight.serve.openai.settings import Limits

#: Frames per second where neither the client nor the file says: what Qwen's processors sample.
USUAL_FPS = 2.0


@dataclass
class Clip:
    """A video.

    Attributes:
        frames: PIL images in RGB, of one size.
        fps: frames per second.
    """

    frames: list[Any]
    fps: float

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return sum(frame.width * frame.height for frame in self.frames)

    def arguments(self) -> tuple[Any, dict[str, Any]]:
        """For a processor: (uint8 [T, H, W, 3], metadata)."""
        count, (width, height) = len(self.frames), self.frames[0].size
        told = {"total_num_frames": count, "fps": self.fps, "frames_indices": list(range(count))}
        told |= {"width": width, "height": height, "duration": count / self.fps}
        return np.stack([np.asarray(frame) for frame in self.frames]), told


def decode_video(files: list[bytes], limits: Limits, param: str, left: int, fps: float | None) -> Clip:
    """A video of its frames.

    Args:
        files: an image file for each frame; or one file that holds them all.
        limits: size limits.
        param: where in the request it stands, for errors.
        left: pixels that the request may still have.
        fps: frames per second; None: the file's own, or `USUAL_FPS`.

    Raises:
        ApiError: 413 if it is too large, 400 if it is no video, damaged, or its frames differ in size.
    """
    _check_count(len(files), limits, param)
    if len(files) == 1:
        return _animation(files[0], limits, param, left, fps)
    frames: list[Any] = []
    for content in files:
        frames.append(decode_image(content, limits, param, left))
        left -= frames[-1].width * frames[-1].height
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise bad(f"The frames differ in size: {sizes[0]} and {sizes[1]}.", param, "invalid_video")
    return Clip(frames, fps or USUAL_FPS)


def _animation(content: bytes, limits: Limits, param: str, left: int, fps: float | None) -> Clip:
    from PIL import ImageSequence

    check_bytes(len(content), limits, param)
    unreadable = (
        "Not a video that can be read here. Send its frames, as data:video/jpeg;base64,FRAME,FRAME,... (each a "
        "JPEG, PNG or WebP file), or an animated GIF, WebP or PNG."
    )
    with opened(content, "video", unreadable, param) as image:
        width, height = image.size
        if width * height > min(left, limits.max_image_pixels):
            raise too_large(f"A frame has {width} x {height} pixels, which is too many.", param, "image_too_large")
        count = getattr(image, "n_frames", 1)
        _check_count(count, limits, param)
        if count * width * height > left:
            raise too_large("The video has too many pixels for one request.", param, "images_too_large")
        frames, seconds = [], 0.0
        for frame in ImageSequence.Iterator(image):
            frames.append(as_seen(frame.copy()))
            seconds += frame.info.get("duration", 0) / 1000
        return Clip(frames, fps or (len(frames) / seconds if seconds else USUAL_FPS))


def _check_count(count: int, limits: Limits, param: str) -> None:
    if count > limits.max_frames:
        raise bad(f"{count} frames; this server takes {limits.max_frames} per video at most.", param, "too_many_frames")
