"""`make evidence`: the commands that a user types, on a world in which only a retrieved picture tells.

The quick form shows that retrieval helps; `make demo` runs it too. The full form (`--full`) shows all claims
and their controls. What is judged and what should come out stands in infra/configs/evidence/judge*.yaml; a
claim that fails is printed as failing. Each command continues or skips what an earlier, perhaps killed, run
has finished.
"""

import sys
import time

from cli.errors import answer
from cli.steps import run_steps
from infra.cluster import CHECKOUT
from infra.errors import ConfigError
from infra.progress import span
from infra.validation_cells import DOCUMENTS

FOLDER = CHECKOUT / "evidence"
"""Each form has a folder of its own below it, where its commands are typed."""
CONFIGS = "../../infra/configs/evidence"
TOWARDS = "--set guidance.scheme=retrieval --set guidance.weight=1 --set guidance.image_weight={}"
"""Guidance towards the documents alone."""
STRONG = TOWARDS.format(6)
"""Of the three choices of documents in the full form: more of the shape than by any weight of all of the prompt
(docs/benchmarks.md)."""


def main() -> None:
    answer("evidence", run_evidence)


def run_evidence() -> None:
    form = {(): "quick", ("--full",): "full"}.get(tuple(sys.argv[1:]))
    if form is None:
        raise ConfigError(f"options {' '.join(sys.argv[1:])}", legal="none, or --full")
    started_s, folder = time.monotonic(), FOLDER / form
    steps = full_steps() if form == "full" else quick_steps()
    run_steps([(folder, step) for step in steps], name="evidence")
    print(f"\nDone in {span(time.monotonic() - started_s)}. Open this page: {folder / 'evidence.html'}")


def quick_steps() -> list[str]:
    """The commands of the quick form, in order."""
    return [
        command("vimi-data world"),
        command("vimi-data crawl", "crawl_clips"),
        command("vimi-data crawl", "crawl_pictures"),
        command("vimi-data build-index"),
        command("vimi-data augment"),
        encode("stage1"),
        command("vimi-train stage1"),
        *(sample(choice, f"--documents {choice}") for choice in DOCUMENTS),
        command("vimi-data judge"),
    ]


def full_steps() -> list[str]:
    """The commands of the full form, in order: 300,000 samples of training."""
    shorter, misled = "--set samples=30000", "--set prompts=prompts-shuffled"
    return [
        command("vimi-data world", more="--nouns 1600 --unseen 128 --distractors 2"),
        command("vimi-data crawl", "crawl_clips"),
        command("vimi-data crawl", "crawl_pictures"),
        command("vimi-data build-index"),
        command("vimi-data augment", more="-k 3"),
        encode("stage1", "--set documents=[1,3]"),
        command("vimi-train stage1", more="--set samples=140000 --set checkpoint.num_to_keep=null"),
        command("vimi-train stage1", more=f"{shorter} --out three --set documents=[3]"),
        command("vimi-train stage1", more="--set samples=60000 --out faithful --set references=faithful"),
        "vimi-data crawl world/pictures_shuffled.jsonl --out pictures-shuffled",
        "vimi-data build-index pictures-shuffled --out memory-shuffled --clip offline",
        command("vimi-data augment", more="--memory memory-shuffled --out prompts-shuffled"),
        encode("stage1", f"{misled} --out encoded-shuffled"),
        command("vimi-train stage1", more=f"{shorter} {misled} --set encodings=encoded-shuffled --out misled"),
        command("vimi-data augment", more="-k 0 --out prompts-empty"),
        command("vimi-data instruct"),
        encode("stage2", "--out encoded-instructions"),
        command("vimi-train stage2"),
        *(sample(choice, f"--documents {choice} {STRONG}") for choice in DOCUMENTS),
        sample("halfway", "--set run=stage1/checkpoints/samples-000000060000"),
        *(sample(run, f"--set run={run}") for run in ("three", "faithful", "misled")),
        sample("misled-none", "--set run=misled --documents none"),
        sample("empty", f"--set prompts_uri=prompts-empty {STRONG}"),
        *(sample(f"guided-{weight}", TOWARDS.format(weight)) for weight in (1, 2, 3)),
        sample("tuned", "--set run=stage2 --set prompts_uri=instructions --set rows=384"),
        sample("untuned", "--set prompts_uri=instructions --set rows=384"),
        command("vimi-data judge", "judge_full"),
    ]


def command(words: str, config: str = "", more: str = "") -> str:
    """A command with its config of this folder, by default the one of its name."""
    name = config or words.split()[-1].replace("-", "_")
    return " ".join(filter(None, [words, f"--config {CONFIGS}/{name}.yaml", more]))


def encode(stage: str, more: str = "") -> str:
    return command("vimi-data encode", more=f"--for {CONFIGS}/{stage}.yaml {more}".strip())


def sample(name: str, how: str) -> str:
    return command("vimi-train sample", more=f"--out samples/{name} {how}")


if __name__ == "__main__":
    main()
