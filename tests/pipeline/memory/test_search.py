"""Laws of search: a batch is its queries one by one, filters come first, LanceDB finds what is there."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from infra.certificate import write_sealed
from infra.clip import Clip, ClipConfig, load_clip
from infra.errors import ConfigError
from pipeline.memory import Memory, open_memory
from pipeline.memory.build_index.index import IndexConfig
from pipeline.memory.retrieve import RETRIEVERS, RetrieveConfig
from pipeline.memory.retrieve.hits import Hits
from pipeline.memory.retrieve.retriever import Retriever, Searched
from pipeline.memory.search import Filters, Query, SearchConfig, Searcher, check, run
from pipeline.memory.tile import Tiles, ask_all
from pipeline.memory.vectors import document_vector, vectors_arrow
from tests.pipeline.clip_tables import picture
from tests.pipeline.memory.memory_tables import documents, make_memory, planted

COUNT = 30


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(ClipConfig(name="offline"))


def made(clip: Clip, folder: Path, shard_rows: int) -> Memory:
    """Real pictures and words with their real vectors."""
    folder.mkdir(exist_ok=True)
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
    make_memory(uri, rows, shard_rows=shard_rows, unit_rows=shard_rows, model_hash=clip.model_hash)
    write_sealed(f"{uri}/job.json", {"config": {"clip": {"name": "offline"}}})
    return open_memory(uri)


@pytest.fixture(scope="module")
def memory(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    return made(clip, tmp_path_factory.mktemp("memory"), 11)


def searcher(memory: Memory, clip: Clip, **values) -> Searcher:
    return Searcher(memory, RetrieveConfig(**{"k": 5, "retriever": "hybrid", **values}), clip)


@pytest.mark.parametrize("retriever", ["bm25", "clip", "hybrid"])
def test_a_batch_is_its_queries_one_by_one(memory: Memory, clip: Clip, retriever: str) -> None:
    ask = searcher(memory, clip, retriever=retriever)
    queries = [Query("a red ball"), Query("number 7"), Query("zzz"), Query("it's a (blue) +ball:")]
    together = ask(queries)
    assert [[h.number for h in hits] for hits in together] == [
        [h.number for h in ask([query])[0]] for query in queries
    ]
    assert [hit.rank for hit in together[0]] == [1, 2, 3, 4, 5]
    assert all(a.score >= b.score for hits in together for a, b in itertools.pairwise(hits))


@pytest.mark.parametrize("retriever", ["bm25", "clip", "hybrid"])
def test_what_scores_below_min_score_is_not_found(memory: Memory, clip: Clip, retriever: str) -> None:
    query = Query("a red ball number 7")
    (hits,) = searcher(memory, clip, retriever=retriever)([query])
    least = hits[2].score
    (found,) = searcher(memory, clip, retriever=retriever, min_score=least)([query])
    assert found == [hit for hit in hits if hit.score >= least] and len(found) >= 3


def test_the_scan_of_lancedb_is_the_exact_search(memory: Memory, clip: Clip) -> None:
    texts = [f"a {word} ball" for word in ("red", "green", "white")]
    for against in ("document", "image", "text"):
        found = searcher(memory, clip, retriever="clip", against=against)([Query(text) for text in texts])
        vectors = clip.encode_texts(texts)
        exact = ask_all(Tiles(memory, against), RETRIEVERS["clip"], texts, vectors, 5)["score"].reshape(3, 5)
        assert np.allclose([[hit.score for hit in hits] for hits in found], exact, atol=2e-3)


def test_an_index_is_held_to_its_floor(tmp_path: Path) -> None:
    """Each shard has a segment of each index."""
    rows, index = documents(700), IndexConfig(min_rows=700, recall=0.9)
    make_memory(str(tmp_path / "m"), rows, shard_rows=300, index=index)
    memory = open_memory(str(tmp_path / "m"))
    facts = memory.certificate.facts["indexes"]
    assert set(facts) == {"image_embedding", "text_embedding", "document_embedding"}
    assert all(0.9 <= fact["recall"] <= 1 and fact["queries"] == 200 for fact in facts.values())
    held = {i.columns[0]: (i.num_segments, i.num_indexed_rows) for i in memory.table.list_indices()}
    assert held == dict.fromkeys(("doc_id", *facts), (3, 700))
    ask = Searcher(memory, RetrieveConfig(retriever="bm25", k=3))
    hits = ask.by_vectors(planted(700)[[7, 408, 699]], 3)
    assert [found.docs[0] for found in hits] == [7, 408, 699]


def test_a_caption_that_many_share_lowers_no_recall(tmp_path: Path) -> None:
    """Which of its equally near documents are found is as good."""
    rows = documents(300)
    same = pa.concat_arrays([rows["text_embedding"].combine_chunks().slice(0, 1)] * 300)
    rows = rows.set_column(
        rows.schema.get_field_index("text_embedding"), rows.schema.field("text_embedding"), same
    )
    wanted = IndexConfig(min_rows=100, recall=0.99, columns=("text_embedding",))
    make_memory(str(tmp_path / "m"), rows, index=wanted)
    assert open_memory(str(tmp_path / "m")).certificate.facts["indexes"]["text_embedding"]["recall"] == 1


def test_a_picture_finds_itself_and_words_find_themselves(memory: Memory, clip: Clip) -> None:
    rows = memory.take(range(COUNT), ["text", "image"]).to_pylist()
    ask = searcher(memory, clip, retriever="clip", against="image")
    found = ask([Query(image=row["image"]) for row in rows[:6]])
    assert [hits[0].number for hits in found] == list(range(6))
    ask = searcher(memory, clip, retriever="clip", against="text")
    assert [hits[0].number for hits in ask([Query(row["text"]) for row in rows])] == list(range(COUNT))
    ask = searcher(memory, clip, retriever="clip", against="document")
    both = [Query(row["text"], row["image"]) for row in rows[:6]]
    assert [hits[0].number for hits in ask(both)] == list(range(6))


@pytest.mark.parametrize("retriever", ["bm25", "clip", "hybrid"])
def test_filters_come_before_ranks(memory: Memory, clip: Clip, retriever: str) -> None:
    ask = searcher(memory, clip, retriever=retriever)
    filters = Filters(sources=("films",), splits=("train",))
    hits = ask([Query("a ball")], filters)[0]
    rows = memory.take([hit.number for hit in hits], ["source_name", "split"]).to_pylist()
    assert len(hits) == 5
    assert all(row["source_name"] == "films" and row["split"] == "train" for row in rows)
    assert ask([Query("a ball")], Filters(sources=("o'nowhere",))) == [[]]
    assert len(ask([Query("a ball")])[0]) == 5


def test_a_retriever_from_elsewhere_is_one_entry(
    memory: Memory, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second best by words, registered from outside: config, search and the join know it by its name."""

    class RunnerUp(Retriever):
        needs_words = True

        def search(
            self, tile: Searched, texts: Sequence[str], vectors: np.ndarray, depth: int
        ) -> list[list[Hits]]:
            return [tile.by_words(texts, depth + 1)]

        def fuse(self, rows: np.ndarray, depth: int) -> np.ndarray:
            return rows[1:]

    with pytest.raises(ValueError, match="no such retriever; legal: bm25, clip, hybrid"):
        RetrieveConfig(retriever="runner-up")
    monkeypatch.setitem(RETRIEVERS, "runner-up", RunnerUp())
    query = [Query("a white ball number 13")]
    words = searcher(memory, clip, retriever="bm25")(query)[0]
    found = searcher(memory, clip, retriever="runner-up", k=5)(query)[0]
    assert [hit.number for hit in found] == [hit.number for hit in words[1:]]
    config = RetrieveConfig(retriever="runner-up")
    with pytest.raises(ConfigError, match="runner-up compares words, the query is a picture"):
        check(SearchConfig(memory=memory.uri, image="dog.jpg", retrieve=config))
    with pytest.raises(ValueError, match="k 0; legal: at least 1"):
        SearchConfig(memory=memory.uri, text="a dog", retrieve=RetrieveConfig(k=0))


class Reranked(Retriever):
    """The first by words, in the order of their pictures' cosines."""

    needs_words = needs_vectors = True

    def search(self, tile: Searched, texts: Sequence[str], vectors: np.ndarray, depth: int) -> list[list[Hits]]:
        return [
            [self._look(tile, *one) for one in zip(tile.by_words(texts, depth), vectors, strict=True)],
        ]

    def _look(self, tile: Searched, hits: Hits, vector: np.ndarray) -> Hits:
        column = tile.take(hits.docs, ["image_embedding"])["image_embedding"]
        pictures = np.array(column.to_pylist(), np.float64).reshape(len(hits), len(vector))
        return replace(hits, second=(pictures * vector).sum(1))

    def fuse(self, rows: np.ndarray, depth: int) -> np.ndarray:
        return rows[np.lexsort((rows["key"], -rows["second"]))]


def test_a_reranker_is_one_class_whose_answer_does_not_hang_on_the_shards(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By words alone many documents are equal: more than are looked at."""
    monkeypatch.setitem(RETRIEVERS, "reranked", Reranked())
    answers = []
    for shard_rows in (30, 7, 1):
        memory = made(clip, tmp_path / str(shard_rows), shard_rows)
        ask = Searcher(memory, RetrieveConfig(retriever="reranked", k=4, depth=8), clip)
        ids = [
            memory.take([hit.number for hit in hits], ["doc_id"])["doc_id"].to_pylist()
            for hits in ask([Query("a white ball"), Query("a red ball number 3"), Query("zzz")])
        ]
        tiles, method = Tiles(memory, "document"), RETRIEVERS["reranked"]
        vectors = clip.encode_texts(["a white ball"])
        joined = method.fuse(ask_all(tiles, method, ["a white ball"], vectors, 8), 8)
        assert joined["doc"][:4].tolist() == [hit.number for hit in ask([Query("a white ball")])[0]]
        assert (np.diff(joined["second"]) <= 0).all() and (np.diff(joined["score"]) > 0).any()
        answers.append(ids)
    assert answers[0] == answers[1] == answers[2] and list(map(len, answers[0])) == [4, 4, 0]


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
