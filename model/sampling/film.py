"""Writes videos as mp4 (PyAV) and contact sheets as PNG; the same frames give the same bytes."""

import hashlib
import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from infra.pictures import PictureError, decode_picture
from infra.storage import join, write_bytes
from infra.videos import X264

CRF = 12
"""x264's quality, 0 = lossless: scores and judges read these files. Ours; its own default, 23, shows."""
COLUMNS, GAP_PX = 8, 2
"""Of a contact sheet."""
ABOVE_GAP_PX = 8
"""Between the pictures above the frames of a contact sheet and the frames."""
WANTED_PX = 320
"""About as wide is a video that is looked at."""


def to_frames(video: Tensor) -> np.ndarray:
    """`t c h w` in [-1, 1] to uint8 `t h w 3`."""
    scaled = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def encode_mp4(frames: np.ndarray, fps: float, *, scale: int = 1) -> bytes:
    """h264 mp4 of uint8 `t h w 3` frames.

    `scale` enlarges by a whole factor, so that small videos can be looked at.
    """
    import av

    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2  # yuv420p wants even sizes
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF), **X264})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            picture = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def contact_sheet(frames: np.ndarray, *, scale: int = 1, above: Sequence[bytes] = ()) -> bytes:
    """PNG of all frames of uint8 `t h w 3`, in rows, on white; and of encoded pictures in a row above them."""
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    shown = [_fitted(picture, *frames.shape[1:3]) for picture in above]
    parts = [_grid(np.stack(shown))] if shown else []
    parts.append(_grid(frames))
    space = ABOVE_GAP_PX if shown else 0
    sheet = np.full(
        (sum(part.shape[0] for part in parts) + space, max(part.shape[1] for part in parts), 3), 255, np.uint8
    )
    sheet[: parts[0].shape[0], : parts[0].shape[1]] = parts[0]
    sheet[-parts[-1].shape[0] :, : parts[-1].shape[1]] = parts[-1]
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def _grid(tiles: np.ndarray) -> np.ndarray:
    """uint8 `h w 3` of tiles `n h w 3` in rows, on white."""
    count, height, width, _ = tiles.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = (number // columns) * (height + GAP_PX), (number % columns) * (width + GAP_PX)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _fitted(picture: bytes, height: int, width: int) -> np.ndarray:
    """An encoded picture, whole, on white, uint8 `h w 3`; white alone if it can't be read."""
    tile = Image.new("RGB", (width, height), "white")
    try:
        shown = ImageOps.contain(decode_picture(picture), (width, height))
    except PictureError:
        return np.asarray(tile)
    tile.paste(shown, ((width - shown.width) // 2, (height - shown.height) // 2))
    return np.asarray(tile)


def scale_to_look_at(width_px: int) -> int:
    """Whole factor that brings a small video to about WANTED_PX."""
    return max(1, WANTED_PX // width_px)


def write_video(
    folder: str, name: str, frames: np.ndarray, fps: float, *, above: Sequence[bytes] = ()
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Write mp4 and contact sheet of uint8 `t h w 3` frames, enlarged to be looked at.

    `name` is that of the files without ending; `above` are encoded pictures to show above the frames: the
    documents that the prompt retrieved.

    Returns:
        What samples.json says of them, and the files by name.
    """
    scale = scale_to_look_at(frames.shape[2])
    files = {
        f"{name}.mp4": encode_mp4(frames, fps, scale=scale),
        f"{name}.png": contact_sheet(frames, scale=max(1, scale // 2), above=above),
    }
    for path, data in files.items():
        write_bytes(join(folder, path), data)
    digest = hashlib.sha256(frames.tobytes()).hexdigest()
    said = {"video": f"{name}.mp4", "sheet": f"{name}.png", "scale": scale, "frames_sha256": digest}
    return said, files
