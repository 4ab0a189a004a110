"""Laws of the files of a sampled video."""

import numpy as np

from model.sampling.film import encode_mp4
from pipeline.media.frames import clip_times, decode_frames


def test_a_file_is_true_to_the_frames_that_were_sampled() -> None:
    """Within 50 dB, of grey cells as small as a generator's; colours lose more: their planes are halved."""
    cells = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1)).astype(np.uint8)
    frames = cells.repeat(3, axis=-1)
    found = decode_frames(encode_mp4(frames, 8.0, scale=20), clip_times(0, len(frames) / 8, len(frames)))
    wanted = frames.repeat(20, axis=1).repeat(20, axis=2)
    error = np.mean((found.astype(float) - wanted) ** 2)
    assert 10 * np.log10(255**2 / error) > 50
