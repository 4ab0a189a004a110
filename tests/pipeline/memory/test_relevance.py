"""Is the first document relevant? Our own captions against MSR-VTT, judged by hand (`relevant.json`)."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.clip import load_clip
from infra.pictures import decode_picture
from pipeline.memory.retrieve.bm25 import Bm25, Hits
from pipeline.memory.retrieve.dense import Dense
from pipeline.memory.retrieve.retrievers import reciprocal_rank
from pipeline.memory.vectors import document_vector
from tests.infra.tiny_clips import mini_clip

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

    def score(found: list[Hits]) -> int:
        firsts = [rows[int(hits.docs[0])]["id"] if len(hits) else None for hits in found]
        return sum(first in label["relevant"] for first, label in zip(firsts, labels, strict=True))

    dense = Dense(vectors).search(clip.encode_texts(captions), DEPTH)
    found = {"clip": score(dense)}
    for analysis in ("none", "english"):
        by_words = Bm25.build(texts, analysis).search(captions, DEPTH)
        fused = [reciprocal_rank(pair, DEPTH) for pair in zip(by_words, dense, strict=True)]
        found |= {f"bm25 {analysis}": score(by_words), f"hybrid {analysis}": score(fused)}
    print("\n".join(f"{name:16} {count:3} of {len(labels)}" for name, count in found.items()))
    assert found["bm25 english"] > found["bm25 none"]
    assert found["hybrid english"] >= max(found["bm25 english"], found["clip"])
