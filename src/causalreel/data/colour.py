"""Colour of video: RGB to and from YUV. What is written is BT.709 in limited range and says so; what is read is taken
for what it says it is."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

BT709 = 1
"""The matrix, the primaries and the transfer function of BT.709 have the same number in H.273, and so in FFmpeg."""
LIMITED, FULL = 1, 2
"""FFmpeg's numbers of the two ranges: 16 to 235, and 0 to 255."""
BT601 = 5
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
"""H.273's numbers of matrices -> swscale's, of those that it converts."""
HD = (1280, 577)
"""A video without tags that is at least as wide, or as high, is BT.709, a smaller one BT.601: as players do it."""


def to_yuv(picture: np.ndarray, format: str = "yuv420p", *, matrix: int = BT709) -> Any:
    """(H,W,3) uint8 RGB -> a PyAV frame of BT.709, or of another matrix, in limited range, tagged."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame = _reformatter().reformat(
        frame,
        format=format,
        dst_colorspace=Colorspace(matrix),
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )
    frame.colorspace, frame.color_range = matrix, LIMITED
    return frame


def tag(context: Any) -> None:
    """Have a codec context, or a stream to be written, say what `to_yuv` makes: matrix, primaries, transfer, range."""
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED


def to_rgb(frame: Any) -> np.ndarray:
    """A decoded PyAV frame -> (H,W,3) uint8 RGB by its own tags; transparent parts are white."""
    from av.video.reformatter import ColorRange, Colorspace

    is_transparent = any(component.is_alpha for component in frame.format.components)
    matrix = MATRICES.get(int(frame.colorspace)) or _usual(frame)
    matrix = matrix if matrix in list(Colorspace) else BT709  # older versions of PyAV do not know BT.2020
    is_full = frame.format.is_rgb or int(frame.color_range) == FULL or frame.format.name.startswith("yuvj")
    frame = _reformatter().reformat(
        frame,
        format="rgba" if is_transparent else "rgb24",
        src_colorspace=Colorspace(matrix),
        src_color_range=ColorRange.JPEG if is_full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
    )
    pixels = frame.to_ndarray()
    if not is_transparent:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _reformatter() -> Any:
    """This thread's converter: preparing swscale for a format and a size takes longer than a small picture does."""
    from av.video.reformatter import VideoReformatter

    if not hasattr(_OF_THREAD, "reformatter"):
        _OF_THREAD.reformatter = VideoReformatter()
    return _OF_THREAD.reformatter


_OF_THREAD = threading.local()


def _usual(frame: Any) -> int:
    return BT709 if frame.width >= HD[0] or frame.height >= HD[1] else BT601
