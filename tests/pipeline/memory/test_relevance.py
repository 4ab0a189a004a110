"""Is the first document relevant? Our own captions against MSR-VTT, judged by hand (`relevant.json`)."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.clip import load_clip
from infra.pictures import decode_picture
from pipeline.memory.retrieve import RETRIEVERS
from pipeline.memory.retrieve.hits import Hits, by_query, flatten, merge
from pipeline.memory.vectors import document_vector
from tests.infra.tiny_clips import mini_clip
from tests.pipeline.memory.test_retrieve import bm25, dense

DOCUMENTS, DEPTH = 600, 100


@pytest.mark.slow
def test_english_analysis_finds_more_and_hybrid_is_no_worse_than_its_parts(
    assets: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(assets / "msrvtt" / "train.parquet").slice(0, DOCUMENTS).to_pylist()
    labels = json.loads((Path(__file__).parent / "relevant.json").read_text())
    captions, texts = [label["caption"] for label in labels], [row["caption"] for row in rows]
    clip = load_clip(mini_clip(assets / "weights", tmp_path, context_length=64))
    pictures = [
        clip.encode_images([decode_picture(row["image"]) for row in rows[start : start + 50]])
        for start in range(0, DOCUMENTS, 50)
    ]
    vectors = document_vector(np.concatenate(pictures), clip.encode_texts(texts)).astype(np.float16)

    def score(*lists: list[Hits]) -> int:
        fuse = RETRIEVERS["hybrid"].fuse
        found = [fuse(own, 1) for own in by_query(merge([flatten(lists)], DEPTH), len(captions))]
        firsts = [rows[int(own["doc"][0])]["id"] if len(own) else None for own in found]
        return sum(first in label["relevant"] for first, label in zip(firsts, labels, strict=True))

    by_vectors = dense(vectors, clip.encode_texts(captions), DEPTH)
    found = {"clip": score(by_vectors)}
    for analysis in ("none", "english"):
        by_words = bm25(texts, analysis).search(captions, DEPTH)
        found |= {f"bm25 {analysis}": score(by_words), f"hybrid {analysis}": score(by_words, by_vectors)}
    print("\n".join(f"{name:16} {count:3} of {len(labels)}" for name, count in found.items()))
    assert found["bm25 english"] > found["bm25 none"]
    assert found["hybrid english"] >= max(found["bm25 english"], found["clip"])
