"""Laws of the page: whole without any of its parts, escaped, self-contained, bounded, the same each time."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.certificate import Certificate, entry_of, write_certificate
from infra.errors import ConfigError, DataError
from infra.run_folder import record_line
from infra.samples import write_samples
from pipeline.prompts.subjects.cutout import Picture
from pipeline.prompts.subjects.entities import find_entities
from pipeline.prompts.tasks import RECIPES, image, replace_words
from pipeline.prompts.tasks import text as text_segment
from pipeline.report import ReportConfig, check, run
from pipeline.report.album import Album
from pipeline.report.galleries import NUM_PROMPTS, prompt_numbers, sample_cards
from pipeline.report.statistics import _random_similarities
from pipeline.schema import CLIPS, PROMPTS, Role, Task, content_id
from pipeline.shards import ShardSet, shard_name, write_meta, write_shard
from tests.pipeline.memory.memory_tables import documents, make_memory

HOSTILE = "A red dog <script>alert('x')</script> is in the grass \"><img src=x onerror=alert(1)> & so on"


VALIDATED = {
    "val/held_out": 0,
    "val/video rows": 16,
    "val/video documents right": 0.11,
    "val/video documents none": 0.2,
    "val/video documents right q0.1": 0.1,
    "val/video documents right q0.9": 0.12,
    "val/video documents none q0.1": 0.1,
    "val/video documents none q0.9": 0.3,
    "val/video none - right": 0.09,
    "val/video none - right error": 0.02,
    "val/video none - right q0.1": 0.0,
    "val/video none - right q0.1 error": 0.001,
    "val/video none - right q0.9": 0.18,
    "val/video none - right q0.9 error": 0.04,
    "val/video video_prediction documents none": 0.5,
    "val/video video_prediction references own": 0.5,
    "val/video video_prediction references none": 0.75,
    "val/video video_prediction none - own": 0.25,
    "val/video video_prediction none - own error": 0.03,
    "val/stage1 video rows": 7,
    "val/stage1 video documents right": 0.26,
    "val/stage1 video since the start": 0.01,
    "val/stage1 video since the start error": 0.002,
    "score/fvd n64": 812.5,
    "score/fvd n64 low": 700.0,
    "score/fvd n64 high": 900.25,
    "score/fvd video_prediction n21": 640.0,
}
"""A record of validation: documents help where there is much noise, and the first frame its task; videos were
sampled and scored."""
VOID = {"meta", "link", "img", "source", "br", "path", "use"}


class Page(HTMLParser):
    """Collects the tags and addresses of a page and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "srcset", "poster", "data", "action"}:
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def picture(number: int, size: tuple[int, int] = (160, 90)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def retrieved(rank: int) -> list[dict[str, Any]]:
    origin = {"doc_id": f"d{rank}", "retriever": "bm25", "rank": rank, "score": 9.5 - rank}
    none = dict.fromkeys(["source_sha256", "start_s", "end_s"])
    document = {**origin, **none, "clip_similarity": 0.2 + 0.01 * rank, "source_uri": "/corpus/a.jpg"}
    base = {"role": "retrieved", "document": document}
    return [
        {**base, "type": "text", "text": f"document {rank} <b>", "image": None},
        {**base, "type": "image", "text": None, "image": picture(rank)},
    ]


def prompt(number: int, task: Task, segments: list[dict[str, Any]]) -> dict[str, Any]:
    frames = np.random.default_rng(number).integers(0, 255, (4, 36, 64, 3), np.uint8)
    target = {"kind": "frames", "data": frames.tobytes(), "num_frames": 4, "height_px": 36, "width_px": 64}
    row: dict[str, Any] = dict.fromkeys(PROMPTS.names)
    return row | {
        "prompt_id": content_id(task, number),
        "task": task.value,
        "clip_id": content_id("clip", number),
        "media": "video",
        "caption": HOSTILE,
        "segments": segments,
        "num_documents": 2,
        "flags": ["fewer_than_k"],
        "target": {**target, "fps": 6.0},
        "source_uri": f"/corpus/{number}.mp4",
    }


def save_shards(folder: Path, job: str, rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    out = str(folder)
    entry = write_shard(f"{out}/{shard_name(0)}", rows, PROMPTS, row_group_rows=2)
    meta = write_meta(out, [entry], row_group_rows=2)
    certificate = Certificate(
        job=job,
        config_hash="c0ffee",
        num_in=len(rows) + 3,
        num_out=len(rows),
        filtered={"filtered_no_subject": 2},
        dead={"undecodable": 1},
        files=[entry, meta],
        facts=facts,
        created_at_s=1_700_000_000.0,
        wall_s=3.0,
    )
    write_certificate(out, certificate)
    return out


def save_clips(folder: Path, source: Path) -> str:
    rows = []
    for number in range(6):
        row: dict[str, Any] = dict.fromkeys(CLIPS.names)
        rows.append(
            row
            | {
                "clip_id": content_id("clip", number),
                "media": "image" if number % 2 else "video",
                "caption": HOSTILE,
                "source_uri": str(source),
                "start_s": 0.0,
                "end_s": 0.0 if number % 2 else 1.5,
                "width_px": 160,
                "height_px": 90,
                "status": "ok" if number < 5 else "unreachable",
            }
        )
    entry = write_shard(f"{folder}/{shard_name(0)}", rows, CLIPS)
    numbers = {"num_in": 6, "num_out": 5, "dead": {"unreachable": 1}}
    write_certificate(str(folder), Certificate.model_validate({"job": "crawl", "config_hash": "1", **numbers}))
    assert entry.rows == 6
    return str(folder)


def save_preview(folder: Path, sheet: bytes) -> None:
    (folder / "sample-000.png").write_bytes(sheet)
    files = [entry_of("sample-000.png", sheet)]
    write_certificate(folder, Certificate(job="preview", config_hash="1", num_in=1, num_out=1, files=files))
    write_samples(str(folder), [{"prompt": "a preview"}])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small output of each kind, with a hostile caption in every row."""
    root = tmp_path_factory.mktemp("parts")
    source = root / "picture.jpg"
    source.write_bytes(picture(7))
    own = {"type": "text", "role": "caption", "text": HOSTILE, "image": None, "document": None}
    pretrain = [prompt(n, Task.PRETRAIN, [*retrieved(1), *retrieved(2), own]) for n in range(3)]
    cut = Picture(find_entities(HOSTILE)[0], Role.SUBJECT, picture(1))
    instructed = [
        prompt(0, task, [text_segment(RECIPES[task].instruction, Role.INSTRUCTION), *content])
        for task, content in [
            (Task.SUBJECT_DRIVEN, replace_words(HOSTILE, [cut])),
            (Task.VIDEO_PREDICTION, [own, image(picture(2), Role.FIRST_FRAME)]),
            (Task.TEXT_TO_VIDEO, [*retrieved(1), *retrieved(2), own]),
        ]
    ]
    trained = root / "stage1"
    trained.mkdir()
    seen = {"seen/video_prediction": 16, "seen/subject_driven": 32}
    lines = [{"samples": n, "loss": 1.0 / n, **seen} for n in range(1, 50)]
    lines += [{"samples": 0, "val/stage1 video documents right": 0.25}, {"samples": 48, **VALIDATED}]
    text = "".join(map(record_line, lines)) + '{"samples": 51, "lo'
    (trained / "metrics.jsonl").write_text(text)
    wanted = instructed[0]["prompt_id"]
    sample = [{"prompt": HOSTILE, "seed": 3, "prompt_id": wanted}, {"prompt": "words", "video": "../x.mp4"}]
    for position in (8, 16, 48):
        shown = trained / "samples" / f"samples-{position:012d}"
        shown.mkdir(parents=True)
        save_preview(shown, picture(position))
    sampled = root / "samples"
    sampled.mkdir()
    (sampled / "sample-000.mp4").write_bytes(b"not really a video")
    (sampled / "sample-000.png").write_bytes(picture(3))
    write_samples(str(sampled), sample)
    return {
        "clips": save_clips(root / "clips", source),
        "prompts": save_shards(
            root / "prompts",
            "augment",
            pretrain,
            {"refused": {"self": 4, "similar": 2}, "remarks": ["words: 3 % of <these>"]},
        ),
        "instructions": save_shards(root / "instructions", "instruct", instructed, {}),
        "runs": [str(trained)],
        "samples": [str(sampled)],
    }


def make_page(out: Path, **values: Any) -> str:
    return Path(run(ReportConfig(out=str(out), **values))).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_page(tmp_path_factory.mktemp("page") / "report.html", **parts)


def test_page_is_well_formed_and_fetches_nothing(page: str):
    found = Page(page)
    assert found.addresses
    assert all(address.startswith(("data:", "#")) for address in found.addresses)
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(", page)
    assert len(set(found.ids)) == len(found.ids)
    assert {a[1:] for a in found.addresses if a.startswith("#")} <= set(found.ids)


def test_hostile_captions_are_words(page: str):
    found = Page(page)
    assert "script" not in found.tags and "iframe" not in found.tags
    assert not found.handlers
    assert "&lt;script&gt;" in page
    assert "<script" not in page and "onerror=alert(1)>" not in page.replace("onerror=alert(1)&gt;", "")


def test_every_picture_has_words_for_those_who_cannot_see_it(page: str):
    assert re.findall(r"<img (?![^>]*alt=)", page) == []
    assert re.findall(r"<svg (?![^>]*aria-label=)", page) == []
    assert '<html lang="en">' in page


def test_page_shows_what_documents_are_worth_with_errors(page: str):
    assert "stage1, video <small>16 training rows at 48 samples" in page
    assert "<td>0.1200</td><td>0.3000</td><td>+0.1800 ± 0.0400</td>" in page
    cells = ("16", "33.3%", "0.5000", "0.7500", "+0.2500 ± 0.0300")  # of a task, with its share of the samples
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    assert f'<th scope="row">video prediction</th>{row}' in page
    assert "stage1, what it keeps of stage 1 <small>7 rows at 48 samples" in page
    assert "<td>0.2500</td><td>0.2600</td><td>+0.0100 ± 0.0020</td>" in page
    assert "stage1, video video prediction" not in page  # it has no documents to compare
    assert 'aria-label="What documents are worth to stage1, video"' in page


def test_page_shows_what_videos_scored_while_training(page: str):
    assert "fvd of stage1 <small>at 48 samples" in page and 'aria-label="fvd of stage1"' in page
    for task, cells in (
        ("all", ("64", "812.5", "812.5", "700 to 900.2")),
        ("video prediction", ("21", "640", "640", "–")),
    ):
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        assert f'<th scope="row">{task}</th>{row}' in page


def test_page_says_what_became_of_each_row(page: str):
    for words in ("no subject", "undecodable", "unreachable", "c0ffee", "similar", "vimi-data redrive"):
        assert words in page
    assert "documents none" in page
    assert "Words: 3 % of &lt;these&gt;." in page  # does retrieval help at all?
    assert "Generate a video with the text and first frame." in page


def test_first_and_last_previews_of_a_run_are_shown(page: str):
    assert "stage1 at 8 samples" in page and "stage1 at 48 samples" in page
    assert "stage1 at 16 samples" not in page


@pytest.mark.parametrize("name", ["sample-000.png", "samples.json", "certificate.json"])
def test_a_flipped_bit_of_a_video_or_its_words_is_refused(tmp_path: Path, name: str) -> None:
    save_preview(tmp_path, picture(1))
    make_page(tmp_path / "page.html", samples=[str(tmp_path)])
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}[^\n]*cure: [^\n]*$"):
        make_page(tmp_path / "page.html", samples=[str(tmp_path)])


def test_a_video_is_shown_with_the_documents_it_was_made_with(parts: dict[str, Any], tmp_path: Path) -> None:
    """Not with those that its row of the shards holds: `--documents shuffled` gives it others."""
    shards = ShardSet(parts["prompts"])
    stored = shards.read_row_group(0, ["prompt_id"])["prompt_id"][0].as_py()
    (tmp_path / "sample-000-retrieved-1.png").write_bytes(picture(5))
    document = {"text": "a thing of another prompt", "picture": "sample-000-retrieved-1.png"}
    entries = [
        {"prompt": "a dog", "prompt_id": stored, "retrieved": [document]},
        {"prompt": "a dog", "prompt_id": stored, "retrieved": []},
        {"prompt": "a cat", "prompt_id": None, "retrieved": [document]},
    ]
    write_samples(str(tmp_path), entries)
    lines = [card["line"] for card in sample_cards(str(tmp_path), [shards], Album(max_bytes=10**6))]
    for line in (lines[0], lines[2]):
        found = [piece for piece in line if piece["role"] == "retrieved"]
        assert [piece.get("text") for piece in found] == ["a thing of another prompt", None]
        assert found[1]["picture"].startswith("data:image/webp")
    assert {piece["role"] for piece in lines[1]} == {"caption"}
    assert lines[2][-1] == {"text": "a cat", "role": "caption"}


def test_a_prompt_of_two_pictures_is_shown_with_its_pictures(tmp_path: Path) -> None:
    segments = [("text", "caption", "A"), ("image", "subject", None), ("text", "caption", "is playing in a")]
    kept: list[dict[str, Any]] = []
    for number, (kind, role, words) in enumerate([*segments, ("image", "background", None)]):
        file = f"sample-000-{role}-{number}.jpg" if kind == "image" else None
        if file:
            (tmp_path / file).write_bytes(picture(number))
        kept.append({"type": kind, "role": role, "text": words, "picture": file})
    entry = {
        "prompt": "A <subject> is playing in a <background>",
        "prompt_id": None,
        "segments": kept,
        "retrieved": [],
    }
    write_samples(str(tmp_path), [entry])
    page = Path(run(ReportConfig(out=str(tmp_path / "page.html"), samples=(str(tmp_path),)))).read_text()
    line = re.search(r'<p class="line">.*?</p>', page, re.DOTALL)
    assert line is not None and "&lt;subject&gt;" not in line[0]
    shown = re.findall(r'words caption">([^<]*)<|inset (\w+)"><img src="data:image/webp', line[0])
    assert shown == [("A", ""), ("", "subject"), ("is playing in a", ""), ("", "background")]
    (tmp_path / kept[1]["picture"]).unlink()
    run(ReportConfig(out=str(tmp_path / "page.html"), samples=(str(tmp_path),)))
    assert '<span class="missing">no picture</span>' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["clips", "prompts", "instructions", "runs", "samples"])
def test_one_part_alone_makes_a_page(name: str, parts: dict[str, Any], tmp_path: Path):
    Page(make_page(tmp_path / "one.html", **{name: parts[name]}))


def test_prompts_without_documents_are_a_quarter_of_those_shown(tmp_path: Path) -> None:
    own = {"type": "text", "role": "caption", "text": HOSTILE, "image": None, "document": None}
    counts = [2 if n % 4 == 0 else 0 for n in range(40)]
    rows = [prompt(n, Task.PRETRAIN, [own]) | {"num_documents": count} for n, count in enumerate(counts)]
    shown = prompt_numbers(ShardSet(save_shards(tmp_path / "few", "augment", rows, {})))
    assert [counts[n] > 0 for n in shown].count(True) == 6 and len(set(shown)) == NUM_PROMPTS
    rows = [row | {"num_documents": 0} for row in rows]
    assert len(prompt_numbers(ShardSet(save_shards(tmp_path / "none", "augment", rows, {})))) == NUM_PROMPTS


def test_same_inputs_make_the_same_page(parts: dict[str, Any], page: str, tmp_path: Path):
    assert make_page(tmp_path / "again", **parts) == page


def test_page_stays_below_its_bound_and_says_what_is_missing(parts: dict[str, Any], tmp_path: Path):
    small = make_page(tmp_path / "small.html", **parts, max_bytes=200_000)
    assert len(small.encode()) <= 200_000
    assert re.search(r"\d+ pictures were left out", small)


def test_nothing_or_foreign_folders_are_refused(parts: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match="nothing to report"):
        check(ReportConfig(out=str(tmp_path / "p.html")))
    with pytest.raises(ConfigError, match="augment"):
        check(ReportConfig(out=str(tmp_path / "p.html"), prompts=parts["clips"]))
    with pytest.raises(ConfigError, match="vimi-data crawl"):
        check(ReportConfig(out=str(tmp_path / "p.html"), clips=str(tmp_path)))
    with pytest.raises(ConfigError, match="metrics"):
        check(ReportConfig(out=str(tmp_path / "p.html"), runs=(str(tmp_path),)))
    with pytest.raises(ConfigError, match="can't write"):
        check(ReportConfig(out="/proc/nowhere/p.html", clips=parts["clips"]))


def test_targets_move_and_stand_still_for_those_who_ask():
    album = Album(max_bytes=1_000_000)
    frames = np.random.default_rng(0).integers(0, 255, (5, 36, 64, 3), np.uint8)
    shown = album.moving(frames, fps=6.0, side_px=64)

    def num_frames(uri: str | None) -> int:
        data = base64.b64decode((uri or "").partition(",")[2])
        return getattr(Image.open(io.BytesIO(data)), "n_frames", 1)

    assert num_frames(shown["moving"]) == 5
    assert num_frames(shown["still"]) == 1
    assert album.picture(b"not a picture", side_px=10) is None


def test_random_pairs_come_from_different_documents(tmp_path: Path):
    make_memory(str(tmp_path / "many"), documents(40))
    found = _random_similarities(str(tmp_path / "many"))
    assert len(found) == 40
    assert found.max() < 0.999  # text and picture of a planted document are one vector
    assert (found == _random_similarities(str(tmp_path / "many"))).all()
    make_memory(str(tmp_path / "one"), documents(1))
    assert len(_random_similarities(str(tmp_path / "one"))) == 0
