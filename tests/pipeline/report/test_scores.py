"""What stands in one table of scores may be compared; everything else stands apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.evaluate import EvaluateConfig
from infra.claim import open_job
from infra.errors import ConfigError
from infra.samples import write_samples
from model.sampling import film
from pipeline.report import ReportConfig, check
from pipeline.report.album import Album, Frames
from pipeline.report.scores import Evaluation, curves, extremes, missing, score_tables
from tests.model.prompt_tables import moving_square, mp4, prompt_row, write_shards
from tests.pipeline.clip_tables import clip_row, write_clips


def evaluation(
    name: str,
    *,
    protocol: str = "p",
    value: float = 1.0,
    position: int | None = None,
    sampled: dict[str, Any] | None = None,
    **found: Any,
):
    how = {"num_steps": 4, "ema": "weights", "checkpoint": f"c{position}"} | (sampled or {})
    system = {"run": "base", "position": position, **how} if position else {}
    manifest = {
        "networks": {"i3d": {"name": "i3d-kinetics-400", "sha256": "af5c50f0df57"}},
        "frames": {"num_frames": 16, "fps": None, "stride": 1},
        "system": system,
    }
    values = {"value": value, "interval": [0.5, 1.5], "better": "lower", "small_n": False, "best": []}
    values |= {"n": 300, "n_real": 300, "failed": 2, "failed_real": 1}
    values |= {"protocol": protocol, "manifest": manifest}
    whole = {"scores": {"fvd": values | found}, "not_computed": {"fid": "no weights"}, "failed": []}
    return Evaluation(name, f"/{name}", whole)


def test_other_protocols_never_share_a_table() -> None:
    tables = score_tables([evaluation("a"), evaluation("b", value=2.0), evaluation("c", protocol="q", n=200)])
    assert [[row["name"] for row in table["rows"]] for table in tables] == [["a", "b"], ["c"]]
    assert "n 300 against 300 real" in tables[0]["facts"] and "i3d-kinetics-400 af5c50f0" in tables[0]["facts"]
    told = {name: text for name, text in tables[0]["rows"][1].items() if name != "manifest"}
    assert told == {
        "name": "b",
        "system": "videos as given",
        "value": "2",
        "interval": "0.5 to 1.5",
        "failed": "3 failed",
    }


def test_each_number_stands_beside_its_own_whole_manifest() -> None:
    long = {"note": "x" * 10_000}
    found = [evaluation(str(n), position=1000 * n, sampled={"seeds": [n], **long}) for n in (1, 2)]
    (table,) = score_tables(found)
    shown = [json.loads(row["manifest"]) for row in table["rows"]]
    assert shown == [one.scores["fvd"]["manifest"] for one in found]


def test_systems_that_differ_in_guidance_or_seeds_have_other_words() -> None:
    how = [
        {"guidance": {"scheme": "cfg", "weight": weight}, "seeds": seeds}
        for weight, seeds in ((4.0, [0]), (8.0, [0]), (4.0, [0, 1]))
    ]
    (table,) = score_tables([evaluation("a", position=1000, sampled=sampled) for sampled in how])
    assert [row["system"] for row in table["rows"]] == [
        "base at 1,000 samples, 4 steps, weights, guidance cfg 4, seed 0",
        "base at 1,000 samples, 4 steps, weights, guidance cfg 8, seed 0",
        "base at 1,000 samples, 4 steps, weights, guidance cfg 4, seeds 0, 1",
    ]


def test_curves_are_over_checkpoints_of_one_run_and_protocol() -> None:
    found = [evaluation(f"e{n}", position=1000 * n, value=10.0 / n) for n in (1, 2, 3)]
    (curve,) = curves([*found, evaluation("other", protocol="q", position=4000)])
    assert curve["title"] == "fvd of base" and "svg" in curve["chart"]
    assert curves(found[:1]) == []


def test_a_curve_holds_what_was_sampled_alike() -> None:
    guided = [{"guidance": {"scheme": "cfg", "weight": weight}} for weight in (4.0, 8.0)]
    found = [evaluation("e", position=1000 * n, sampled=how) for how in guided for n in (1, 2)]
    assert ["guidance cfg 4" in curve["note"] for curve in curves(found)] == [True, False]
    assert curves([found[0], found[3]]) == []


class Shown(Album):
    """Keeps the frames of the strips that a page shows."""

    def __init__(self) -> None:
        super().__init__(max_bytes=10**7)
        self.strips: list[np.ndarray] = []

    def filmstrip(self, frames: Frames, *, height_px: int) -> str | None:
        self.strips.append(np.asarray(frames))
        return super().filmstrip(frames, height_px=height_px)


def shown(
    folder: Path, videos: Path, texts: dict[str, str], metrics: tuple[str, ...] = ("flicker",)
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Strips and cards of an evaluation whose best videos are these."""
    config = EvaluateConfig(videos=str(videos), out=str(folder), metrics=metrics)
    open_job(str(folder), job="evaluate", config=config, inputs={})
    rows = [
        {"side": "sampled", "name": n, "text": t, "scores": dict.fromkeys(metrics, 1.0)}
        for n, t in texts.items()
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "videos.jsonl").write_bytes(lines.encode())
    manifest = {"frames": {"num_frames": 4, "fps": None, "stride": 1}}
    scores = {name: {"best": [*texts], "worst": [], "manifest": manifest} for name in metrics}
    album = Shown()
    cards = list(extremes(Evaluation("e", str(folder), {"scores": scores}), album))
    assert all(card["strip"] for card in cards), [card["facts"] for card in cards]
    return album.strips, cards


def test_the_page_shows_the_frames_that_rows_carry(tmp_path: Path) -> None:
    rows = [prompt_row(n, kind=kind, num_frames=6) for n, kind in enumerate(("frames", "video"))]
    shards = write_shards(tmp_path / "prompts", rows, job="augment", group_rows=4, file_rows=4)
    strips, _ = shown(tmp_path / "e", shards, {row["prompt_id"]: row["caption"] for row in rows})
    for number, strip in enumerate(strips):
        frames = moving_square(number, num_frames=6, height=24, width=40)[:4]
        assert np.abs(strip.astype(int) - frames).mean() < 2


def test_the_page_shows_the_part_of_a_file_that_a_clip_is(tmp_path: Path) -> None:
    frames = np.zeros((40, 64, 64, 3), np.uint8)
    frames[20:] = 200
    (tmp_path / "long.mp4").write_bytes(mp4(frames))
    row = clip_row(tmp_path / "long.mp4", "a thing", media="video", start_s=3.0, end_s=5.0)
    clips = Path(write_clips(tmp_path / "clips", [row]))
    (strip,), _ = shown(tmp_path / "e", clips, {row["clip_id"]: "a thing"})
    assert strip.mean() > 190


def test_the_page_shows_a_sample_at_the_size_that_was_scored(tmp_path: Path) -> None:
    made = moving_square(0, num_frames=4, height=18, width=21)
    said, _ = film.write_video(str(tmp_path / "samples"), "sample-000", made, 8)
    write_samples(str(tmp_path / "samples"), [{**said, "prompt": "A dog.", "segments": []}])
    (strip,), _ = shown(tmp_path / "e", tmp_path / "samples", {"sample-000.mp4": "A dog."})
    assert strip.shape == made.shape


def test_the_page_takes_any_text(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(mp4(moving_square(0, num_frames=4, height=24, width=40)))
    _, (card,) = shown(tmp_path / "e", folder, {"a.mp4": "one\u2028two\x85three"})
    assert card["facts"] == "e · best flicker 1 · a.mp4"


def test_every_metric_has_its_best_videos_on_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(mp4(moving_square(0, num_frames=4, height=24, width=40)))
    metrics = ("clip_t", "clip_i", "copy_guard", "consistency", "flicker", "dynamics")
    _, cards = shown(tmp_path / "e", folder, {"a.mp4": "A dog."}, metrics)
    assert [card["facts"].split()[3] for card in cards] == [*metrics]


def test_what_was_not_computed_is_told() -> None:
    assert missing([evaluation("a")]) == ["a: no fid: no weights"]


def test_scores_are_an_evaluations(tmp_path) -> None:
    with pytest.raises(ConfigError, match="vimi-train evaluate"):
        check(ReportConfig(out=str(tmp_path / "page.html"), scores=(str(tmp_path),)))
