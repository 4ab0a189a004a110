"""Pictures inside the page: data URIs under one budget of bytes."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from infra.pictures import PictureError, decode_picture, fit_inside

Frames = Sequence[np.ndarray] | np.ndarray


class Album:
    """Hands out data URIs until the budget is spent; counts what it had to leave out."""

    def __init__(self, *, max_bytes: int) -> None:
        self.left_bytes, self.left_out = max_bytes, 0

    def add(self, data: bytes, mime: str) -> str | None:
        """The bytes as a data URI, or None when the page would grow too large."""
        uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        if len(uri) > self.left_bytes:
            self.left_out += 1
            return None
        self.left_bytes -= len(uri)
        return uri

    def picture(self, image: bytes | None, *, side_px: int) -> str | None:
        """A still picture, at most `side_px` on its longer side; None when it can't be decoded."""
        try:
            opened = None if image is None else decode_picture(image)
        except PictureError:
            return None
        return None if opened is None else self.add(_webp(fit_inside(opened, side_px)), "image/webp")

    def filmstrip(self, frames: Frames, *, height_px: int) -> str | None:
        """Frames side by side, with a gap of 2 px."""
        tiles = [_to_height(Image.fromarray(frame), height_px) for frame in frames]
        width = sum(tile.width + 2 for tile in tiles) - 2
        strip = Image.new("RGB", (max(width, 1), height_px), (128, 128, 128))
        left = 0
        for tile in tiles:
            strip.paste(tile, (left, 0))
            left += tile.width + 2
        return self.add(_webp(strip), "image/webp")

    def moving(self, frames: Frames, *, fps: float, side_px: int) -> dict[str, str | None]:
        """Frames as an animated picture, and the first one still for those who want no motion."""
        images = [fit_inside(Image.fromarray(frame), side_px) for frame in frames]
        still = self.add(_webp(images[0]), "image/webp")
        if len(images) == 1 or still is None:
            return {"moving": still, "still": still}
        buffer = io.BytesIO()
        pause_ms = round(1000 / min(max(fps, 1.0), 50.0)) if np.isfinite(fps) else 1000
        images[0].save(
            buffer, "WEBP", save_all=True, append_images=images[1:], duration=pause_ms, loop=0, quality=72
        )
        return {"moving": self.add(buffer.getvalue(), "image/webp") or still, "still": still}


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


def _to_height(image: Image.Image, height_px: int) -> Image.Image:
    return image.resize(
        (max(1, round(image.width * height_px / image.height)), height_px), Image.Resampling.LANCZOS
    )
