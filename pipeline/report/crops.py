"""The page's part on subjects: what was cut out, what was left out, cross-pairs, from clip to instruction."""

from collections.abc import Iterable
from typing import Any

from infra.certificate import Certificate
from infra.storage import join
from pipeline.prompts.subjects.crops import reason_of
from pipeline.report.album import Album
from pipeline.report.charts import counted_histogram
from pipeline.report.read import Parts, spread, table_files
from pipeline.schema import Status, Task
from pipeline.shards import PAIRS_FILE, open_part

NUM_KEPT, NUM_LEFT_OUT, NUM_PAIRS = 24, 6, 6
"""Shown on the page: crops that were kept, those of each reason, cross-pairs of each fate. Ours."""
MAX_GROUPS = 32
"""Row groups of the table that are looked into, evenly spread. Ours."""
FATES = {
    "used": "Used",
    "near_duplicate": "Near-duplicates, left out",
    "too_unlike": "Too unlike, left out",
}
Card = dict[str, Any]


def crop_groups(parts: Parts, album: Album) -> list[Card]:
    """Crops by verdict: those that were kept first, then each reason, the most frequent first."""
    if parts.crops is None:
        return []
    rows: dict[str, list[Card]] = {}
    for row in _some_rows(parts.crops):
        kept = row["status"] == Status.OK
        rows.setdefault("kept" if kept else reason_of(row), []).append(row)
    total = _totals(parts.certificates["subjects"][1])
    groups = []
    for verdict in sorted(rows, key=lambda name: (name != "kept", -total.get(name, 0), name)):
        shown = [row for row in rows[verdict] if row["image"]]
        chosen = [shown[i] for i in spread(len(shown), NUM_KEPT if verdict == "kept" else NUM_LEFT_OUT)]
        cards = [
            {"picture": album.picture(row["image"], side_px=144), "phrase": row["phrase"]} for row in chosen
        ]
        groups.append({"verdict": verdict, "total": total.get(verdict, len(rows[verdict])), "cards": cards})
    return groups


def _totals(certificate: Certificate) -> dict[str, int]:
    """Rows of the table by verdict."""
    return {"kept": certificate.num_out, **certificate.facts["reasons"]}


def _some_rows(folder: str) -> Iterable[Card]:
    groups = [(file, number) for file in table_files(folder) for number in range(file.num_row_groups)]
    for place in spread(len(groups), MAX_GROUPS):
        file, number = groups[place]
        yield from file.read_row_group(number, ["phrase", "image", "status", "error"]).to_pylist()


def cross_pairs(parts: Parts, album: Album) -> Card | None:
    """A chart of all similarities, and some pairs of each fate side by side."""
    if parts.instructions is None or PAIRS_FILE not in parts.instructions.files:
        return None
    pairs = open_part(join(parts.instructions.uri, PAIRS_FILE)).read().to_pylist()
    facts = parts.instructions.certificate.facts
    title = "Similarity of cross-pairs"
    chart = counted_histogram(facts["similarities"], x_label="CLIP cosine", title=title)
    chosen = {fate: _spread_by_similarity(pairs, fate) for fate in FATES}
    wanted = {
        pair[side] for found in chosen.values() for pair in found for side in ("target_crop", "reference_crop")
    }
    pictures = _pictures(parts.crops, wanted) if parts.crops else {}
    groups = []
    for fate, found in chosen.items():
        cards = [
            {
                "phrase": pair["phrase"],
                "similarity": pair["similarity"],
                "target": album.picture(pictures.get(pair["target_crop"]), side_px=144),
                "reference": album.picture(pictures.get(pair["reference_crop"]), side_px=144),
            }
            for pair in found
        ]
        groups.append({"fate": FATES[fate], "total": facts["pairs"].get(fate, 0), "cards": cards})
    return {"chart": chart, "total": sum(facts["pairs"].values()), "groups": groups}


def _spread_by_similarity(pairs: list[Card], fate: str) -> list[Card]:
    found = sorted((p for p in pairs if p["fate"] == fate), key=lambda p: (p["similarity"], p["target_crop"]))
    return [found[i] for i in spread(len(found), NUM_PAIRS)]


def _pictures(folder: str, crops: set[str]) -> dict[str, bytes]:
    """crop_id -> its picture; only the row groups that hold one are read whole."""
    found: dict[str, bytes] = {}
    for file in table_files(folder):
        for number in range(file.num_row_groups):
            if crops.isdisjoint(file.read_row_group(number, ["crop_id"])["crop_id"].to_pylist()):
                continue
            rows = file.read_row_group(number, ["crop_id", "image"]).to_pylist()
            found |= {row["crop_id"]: row["image"] for row in rows if row["crop_id"] in crops}
    return found


def funnel(parts: Parts) -> list[Card]:
    """From rows of the corpus to subject-driven instructions: counts, and the share of the step before.

    [] = no step of it has pictures of words.
    """
    certificates = {job: certificate for job, (_, certificate) in parts.certificates.items()}
    steps: list[tuple[str, int]] = []
    if "crawl" in certificates:
        steps += [
            ("rows of the corpus", certificates["crawl"].num_in),
            ("good clips", certificates["crawl"].num_out),
        ]
    if "augment" in certificates:
        steps.append(("prompts", certificates["augment"].num_out))
    if "subjects" in certificates:
        steps.append(("a word is surely shown", certificates["subjects"].facts["clips_with_a_picture"]))
    asked = _asked_for_subjects(certificates.get("instruct"))
    if "instruct" in certificates and (asked or "subjects" in certificates):
        made = certificates["instruct"].facts.get("tasks", {})
        steps.append(("subject-driven instructions", made.get(Task.SUBJECT_DRIVEN, 0)))
    if len(steps) < 2 or not (asked or "subjects" in certificates):
        return []
    first = max(max(count for _, count in steps), 1)
    return [
        {"name": name, "count": count, "share": count / first, "of_last": count / max(before, 1)}
        for (name, count), before in zip(steps, [steps[0][1], *(count for _, count in steps)], strict=False)
    ]


def _asked_for_subjects(instruct: Certificate | None) -> bool:
    """Whether the instructions were to show pictures of words: some do, or some could not."""
    facts = instruct.facts if instruct else {}
    made, reasons = facts.get("tasks", {}), facts.get("reasons", {})
    return Task.SUBJECT_DRIVEN in made or any(reason.startswith(Task.SUBJECT_DRIVEN) for reason in reasons)


def subjects_part(parts: Parts, album: Album) -> Card | None:
    """All of it; None = there is neither a table of crops nor a cross-pair, nor a step towards them."""
    groups, pairs, steps = crop_groups(parts, album), cross_pairs(parts, album), funnel(parts)
    if not groups and pairs is None and not steps:
        return None
    return {"groups": groups, "pairs": pairs, "funnel": steps}
