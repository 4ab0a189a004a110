"""Which of the caption's words is this cut-out? Asked of CLIP, when the job has one.

Without it the first subject that the caption names is taken to be what the camera shows. That holds for
"a dog is playing in the grass" and fails for "a person mixing chocolate in a bowl", where the bowl fills
the picture. With CLIP each cut-out gets the word whose text is nearest, and one that is nearest to no
usable word, or as near to two, is left out (Phantom-Data rechecks its pairs in the same spirit, by a
vision-language model).
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from infra.clip import Clip
from pipeline.prompts.subjects.entities import Entity

TEMPLATE = "a photo of a {}"
"""The plainest of the templates with which CLIP was evaluated (Radford et al. 2021)."""


def name_pictures(
    pictures: Sequence[Image.Image],
    entities: Sequence[Entity],
    usable: Sequence[Entity],
    clip: Clip,
    margin: float,
) -> list[Entity | None]:
    """For each cut-out its entity, or None; no entity twice.

    Args:
        pictures: cut-outs, largest first.
        entities: all of the caption's entities: places and plurals compete, and win nothing.
        usable: those that a cut-out may replace.
        clip: the judge.
        margin: least lead of the nearest word in cosine over the second.
    """
    vectors = clip.encode_images(list(pictures))
    texts = clip.encode_texts([TEMPLATE.format(entity.text) for entity in entities])
    return choose(vectors @ texts.T, entities, usable, margin)


def choose(
    similarity: np.ndarray, entities: Sequence[Entity], usable: Sequence[Entity], margin: float
) -> list[Entity | None]:
    """Assign each row of `similarity` (pictures x entities) its clear winner, first come first served."""
    chosen: list[Entity | None] = []
    for row in similarity:
        order = np.argsort(-row, kind="stable")
        best = entities[int(order[0])]
        clear = len(order) == 1 or row[order[0]] - row[order[1]] >= margin
        chosen.append(best if clear and best in usable and best not in chosen else None)
    return chosen
