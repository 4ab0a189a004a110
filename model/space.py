"""Pixel or latent space of the generator: its shapes, strides and sigma_in.

A `Space` is the shape of the way between the two, measured once and kept with every checkpoint, so that
a network can be built without loading the autoencoder.
"""

from dataclasses import dataclass

from infra.errors import ConfigError


@dataclass(frozen=True)
class Space:
    """What a clip of pixels becomes.

    Attributes:
        channels: of what the generator sees; 3 for pixels.
        factor_px: pixels along a side of one latent.
        factor_frames: frames to one latent in time (after the first, if causal).
        is_causal: the first frame has a latent of its own.
        identity: hash of the autoencoder's weights and config; "" for pixels.
    """

    channels: int = 3
    factor_px: int = 1
    factor_frames: int = 1
    is_causal: bool = False
    identity: str = ""

    @property
    def is_latent(self) -> bool:
        return self.identity != ""

    @property
    def has_first_frame(self) -> bool:
        """Whether the first frame is encoded by itself, so that it can be given."""
        return self.factor_frames == 1 or self.is_causal

    def legal_frames(self, num_frames: int) -> int:
        """The next number of frames that the autoencoder keeps whole: 1 + n f if causal, n f if not."""
        first = 1 if self.is_causal else 0
        return first + -(-(num_frames - first) // self.factor_frames) * self.factor_frames

    def shape(self, num_frames: int, height_px: int, width_px: int) -> tuple[int, int, int, int]:
        """(t', c', h', w') of a clip.

        Raises:
            ConfigError: a side that the autoencoder can't divide; names the nearest legal one.
        """
        f = self.factor_px
        if height_px % f or width_px % f:
            legal = f"{-(-height_px // f) * f} x {-(-width_px // f) * f}"
            raise ConfigError(
                f"{height_px} x {width_px} pixels don't divide into latents of {f}",
                legal=f"multiples of {f}",
                cure=f"use {legal} (height x width)",
            )
        first = 1 if self.is_causal else 0
        frames = first + (self.legal_frames(num_frames) - first) // self.factor_frames
        return frames, self.channels, height_px // f, width_px // f


PIXELS = Space()
