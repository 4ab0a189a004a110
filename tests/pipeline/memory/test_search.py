"""Laws of search: a batch is its queries one by one, filters come first, every engine says the same."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from infra.certificate import write_sealed
from infra.clip import Clip, ClipConfig, load_clip
from infra.errors import ConfigError
from pipeline.memory import Memory, open_memory
from pipeline.memory.commit import create_table
from pipeline.memory.index import finish
from pipeline.memory.recall import IndexConfig
from pipeline.memory.retrieve.bm25 import Hits
from pipeline.memory.retrieve.documents import load_documents
from pipeline.memory.retrieve.indexes import open_search
from pipeline.memory.retrieve.retrievers import RETRIEVERS, Index, RetrieveConfig, Retriever
from pipeline.memory.search import Filters, Query, SearchConfig, Searcher, check, run
from pipeline.memory.store import upsert, vectors_arrow
from pipeline.memory.vectors import document_vector
from tests.pipeline.clip_tables import picture
from tests.pipeline.memory import memory_tables
from tests.pipeline.memory.memory_tables import documents, make_memory

COUNT = 30


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(ClipConfig(name="offline"))


@pytest.fixture(scope="module")
def memory(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """Real pictures and words with their real vectors."""
    folder = tmp_path_factory.mktemp("memory")
    files = [picture(folder / f"{n}.jpg", n) for n in range(COUNT)]
    rows = documents(COUNT, dim=clip.dim)
    image = clip.encode_images([Image.open(file).convert("RGB") for file in files])
    text = clip.encode_texts(rows["text"].to_pylist())
    vectors = {"image": image, "text": text, "document": document_vector(image, text)}
    for name, values in vectors.items():
        place = rows.schema.get_field_index(f"{name}_embedding")
        rows = rows.set_column(place, rows.schema.field(place), vectors_arrow(values))
    place = rows.schema.get_field_index("image")
    rows = rows.set_column(place, rows.schema.field(place), pa.array([f.read_bytes() for f in files]))
    uri = str(folder / "memory")
    memory_tables.MODEL_HASH = clip.model_hash
    table = create_table(uri, clip.dim)
    upsert(table, rows)
    facts = finish(table, IndexConfig()).facts
    make_memory(uri, rows, dim=clip.dim, indexes=facts)
    write_sealed(f"{uri}/job.json", {"config": {"clip": {"name": "offline"}}})
    return open_memory(uri)


def searcher(memory: Memory, clip: Clip, **values) -> Searcher:
    return Searcher(memory, RetrieveConfig(**{"k": 5, "retriever": "hybrid", **values}), clip)


def image_of(memory: Memory, doc_id: str) -> bytes:
    return memory.images([doc_id])[doc_id]


@pytest.mark.parametrize("engine", ["arrays", "lance"])
@pytest.mark.parametrize("retriever", ["bm25", "clip", "hybrid"])
def test_a_batch_is_its_queries_one_by_one(memory: Memory, clip: Clip, retriever: str, engine: str) -> None:
    ask = searcher(memory, clip, retriever=retriever, engine=engine)
    queries = [Query("a red ball"), Query("number 7"), Query("zzz"), Query("it's a (blue) +ball:")]
    together = ask(queries)
    assert [[h.doc_id for h in hits] for hits in together] == [
        [h.doc_id for h in ask([query])[0]] for query in queries
    ]
    assert [hit.rank for hit in together[0]] == [1, 2, 3, 4, 5]
    assert all(a.score >= b.score for hits in together for a, b in itertools.pairwise(hits))


def test_both_engines_find_the_same_by_vector(memory: Memory, clip: Clip) -> None:
    queries = [Query(f"a {word} ball") for word in ("red", "green", "white")]
    for against in ("document", "image", "text"):
        one, other = (
            searcher(memory, clip, retriever="clip", against=against, engine=engine)(queries)
            for engine in ("arrays", "lance")
        )
        for a, b in zip(one, other, strict=True):
            assert np.allclose([h.score for h in a], [h.score for h in b], atol=2e-3)


def test_a_picture_finds_itself_and_words_find_themselves(memory: Memory, clip: Clip) -> None:
    rows = memory.columns_arrow(["doc_id", "text"]).to_pylist()
    ask = searcher(memory, clip, retriever="clip", against="image")
    found = ask([Query(image=image_of(memory, row["doc_id"])) for row in rows[:6]])
    assert [hits[0].doc_id for hits in found] == [row["doc_id"] for row in rows[:6]]
    ask = searcher(memory, clip, retriever="clip", against="text")
    assert [h[0].doc_id for h in ask([Query(row["text"]) for row in rows])] == [r["doc_id"] for r in rows]
    ask = searcher(memory, clip, retriever="clip", against="document")
    both = [Query(row["text"], image_of(memory, row["doc_id"])) for row in rows[:6]]
    assert [hits[0].doc_id for hits in ask(both)] == [row["doc_id"] for row in rows[:6]]


@pytest.mark.parametrize("engine", ["arrays", "lance"])
@pytest.mark.parametrize("retriever", ["bm25", "clip", "hybrid"])
def test_filters_come_before_ranks(memory: Memory, clip: Clip, retriever: str, engine: str) -> None:
    ask = searcher(memory, clip, retriever=retriever, engine=engine)
    filters = Filters(sources=("films",), splits=("train",))
    hits = ask([Query("a ball")], filters)[0]
    rows = memory.rows([hit.doc_id for hit in hits], ["source_name", "split"]).to_pylist()
    assert len(hits) == 5
    assert all(row["source_name"] == "films" and row["split"] == "train" for row in rows)
    assert ask([Query("a ball")], Filters(sources=("o'nowhere",))) == [[]]


def test_a_retriever_from_elsewhere_is_one_entry(
    memory: Memory, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second best by words, registered from outside: config, search and the join know it by its name."""

    def runner_up(index: Index, texts: Sequence[str], _: np.ndarray, depth: int) -> list[Hits]:
        found = index.by_words(texts, depth + 1)
        return [Hits(hits.docs[1:], hits.scores[1:]) for hits in found]

    with pytest.raises(ValueError, match="no such retriever; legal: bm25, clip, hybrid"):
        RetrieveConfig(retriever="runner-up")
    monkeypatch.setitem(RETRIEVERS, "runner-up", Retriever(runner_up, needs_words=True))
    query = [Query("a white ball number 13")]
    for engine in ("arrays", "lance"):
        words = searcher(memory, clip, retriever="bm25", engine=engine)(query)[0]
        found = searcher(memory, clip, retriever="runner-up", engine=engine, k=4)(query)[0]
        assert [hit.doc_id for hit in found] == [hit.doc_id for hit in words[1:]]
    config = RetrieveConfig(retriever="runner-up")
    documents = load_documents(memory)
    assert open_search(config, documents, memory)(["a ball"], None, 3)[0].docs.shape == (3,)
    with pytest.raises(ConfigError, match="runner-up compares words, the query is a picture"):
        check(SearchConfig(memory=memory.uri, image="dog.jpg", retrieve=config))


def test_the_command_prints_a_table_and_writes_pictures(
    memory: Memory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SearchConfig(memory=memory.uri, text="a <b>white</b> ball", out=str(tmp_path))
    rows = run(config)
    printed = capsys.readouterr().out
    assert "white ball" in printed and "search.html" in printed and len(rows) == 12
    page = (tmp_path / "search.html").read_text()
    assert "Content-Security-Policy\" content=\"default-src 'none'" in page
    assert "&lt;b&gt;white" in page and page.count("<figure>") == 12
    assert Image.open(io.BytesIO((tmp_path / "search.png").read_bytes())).width > 1000


def test_nothing_found_is_said_in_words(memory: Memory, capsys: pytest.CaptureFixture[str]) -> None:
    question = SearchConfig(memory=memory.uri, text="zzz", retrieve=RetrieveConfig(retriever="bm25", k=3))
    assert run(question) == []
    assert "nothing found among 30 documents (bm25): none shares a word" in capsys.readouterr().out


def test_questions_that_make_no_sense_are_refused(memory: Memory, clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to search for"):
        check(SearchConfig(memory=memory.uri, text="  "))
    with pytest.raises(ConfigError, match="no picture at"):
        check(SearchConfig(memory=memory.uri, image=str(tmp_path / "absent.jpg")))
    with pytest.raises(ConfigError, match="bm25 compares words"):
        words = RetrieveConfig(retriever="bm25")
        check(SearchConfig(memory=memory.uri, image=__file__, retrieve=words))
    with pytest.raises(ConfigError, match="picture can't be read"):
        searcher(memory, clip, retriever="clip")([Query(image=b"no picture")])
    with pytest.raises(ConfigError, match="needs a CLIP"):
        Searcher(memory, RetrieveConfig(retriever="clip"))
