"""Laws of retrieval for a user's prompt: the ranks of search, and nothing of an evaluation."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from infra.clip import Clip
from infra.errors import ConfigError
from pipeline.memory import Memory, open_memory
from pipeline.memory.retrieve import RetrieveConfig
from pipeline.memory.search import Query, Searcher
from pipeline.prompts.guard import GuardConfig
from pipeline.prompts.user_prompt import PromptRetriever
from tests.pipeline.memory.memory_tables import documents, make_memory
from tests.pipeline.memory.test_search import clip, memory  # noqa: F401 # pyright: ignore[reportUnusedImport]

TEXTS = ["a red ball", "number 7"]


def ids(row: dict) -> list[str]:
    return [s["document"]["doc_id"] for s in row["segments"] if s["type"] == "text" and s.get("document")]


@pytest.mark.parametrize("retriever", ["bm25", "clip", "hybrid"])
def test_documents_are_those_of_search_in_its_order(memory: Memory, clip: Clip, retriever: str):  # noqa: F811
    config = RetrieveConfig(retriever=retriever, k=5)
    found = PromptRetriever(memory, config, clip)(TEXTS)
    ranked = Searcher(memory, config.model_copy(update={"k": 100}), clip)([Query(text) for text in TEXTS])
    for text, row, hits in zip(TEXTS, found, ranked, strict=True):
        names = memory.take([hit.number for hit in hits], ["doc_id"])["doc_id"].to_pylist()
        places = [names.index(doc_id) for doc_id in ids(row)]
        assert places == sorted(places) and places[0] == 0 and len(places) == row["num_documents"] > 1
        assert (row["segments"][-1]["role"], row["segments"][-1]["text"]) == ("caption", text)
        similarities = [s["document"]["clip_similarity"] for s in row["segments"] if s.get("document")]
        assert all((similarity is None) == (retriever == "bm25") for similarity in similarities)
        alone = PromptRetriever(memory, config, clip)([text])[0]
        assert alone == row  # whatever else is asked with it


def test_nothing_of_an_evaluation_is_found(tmp_path: Path) -> None:
    rows = documents(30)
    place = rows.schema.get_field_index("split")
    splits = pa.array([("train", "test", None)[n % 3] for n in range(30)])
    make_memory(str(tmp_path / "memory"), rows.set_column(place, rows.schema.field(place), splits))
    (tmp_path / "listed.txt").write_text("\n".join(f"/corpus/{n}.png" for n in range(15)))
    opened = open_memory(str(tmp_path / "memory"))
    numbers = {doc: n for n, doc in enumerate(rows["doc_id"].to_pylist())}
    config = RetrieveConfig(k=30)
    for exclude, legal in ((None, set(range(30))), (str(tmp_path / "listed.txt"), set(range(15, 30)))):
        [row] = PromptRetriever(opened, config, guard=GuardConfig(exclude=exclude))(["a ball"])
        found = {numbers[doc_id] for doc_id in ids(row)}
        assert found and found <= {n for n in legal if n % 3 != 1}


def test_an_empty_memory_finds_nothing(tmp_path: Path) -> None:
    make_memory(str(tmp_path / "memory"), documents(3).slice(0, 0))
    [row] = PromptRetriever(open_memory(str(tmp_path / "memory")), RetrieveConfig())(["a ball"])
    assert [(s["role"], s["text"]) for s in row["segments"]] == [("caption", "a ball")]


def test_a_memory_of_another_clip_is_refused(tmp_path: Path, clip: Clip) -> None:  # noqa: F811
    make_memory(str(tmp_path / "memory"), documents(3, dim=clip.dim))
    opened = open_memory(str(tmp_path / "memory"))
    facts = opened.certificate.facts | {"model_hash": "another"}
    other = replace(opened, certificate=opened.certificate.model_copy(update={"facts": facts}))
    with pytest.raises(ConfigError, match=r"was embedded with offline \(another\), not with offline"):
        PromptRetriever(other, RetrieveConfig(retriever="clip"), clip)
    with pytest.raises(ConfigError, match="retriever hybrid needs a CLIP"):
        PromptRetriever(other, RetrieveConfig(retriever="hybrid"))
