"""`vimi-data`: corpus -> clips -> memory -> prompts, and looking at what was made. Words only."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.common import Fields, Job, Out, command, make_app, shorten
from cli.errors import run_app
from cli.recipes import clip_option, train_command, unused

if TYPE_CHECKING:
    from pipeline.report.validate import Report

app = make_app("Build the data: crawl clips, index a memory, retrieve for every caption, write prompt shards.")

Clips = Annotated[list[str] | None, typer.Argument(help="Folders that `vimi-data crawl` made.")]
Memory = Annotated[str | None, typer.Option(help="Folder that `vimi-data build-index` made.")]
Prompts = Annotated[str | None, typer.Argument(help="Folder that `vimi-data augment` made.")]
Shards = Annotated[str | None, typer.Argument(help="Folder of augment or instruct.")]
Retriever = Annotated[str | None, typer.Option(help="Retriever by name: see retrieve.retriever below.")]


def main() -> None:
    run_app(app, "vimi-data")


def _world(config: Any) -> str:
    from pipeline.prompts.guard import HIGHEST, MIN_DOCUMENTS

    names = [unused(name) for name in ("clips", "pictures", "memory", "prompts")]
    clips, pictures, memory, prompts = names
    sizes = {"num_frames": config.frames, "height_px": config.size_px, "width_px": config.size_px}
    target = "".join(f" --set target.{name}={size}" for name, size in sizes.items())
    k, documents = 1 + config.distractors, (config.nouns + config.unseen) * (1 + config.distractors)
    if documents < MIN_DOCUMENTS:  # too few to measure what a copy is: to a small CLIP simple things are alike
        target += f" --set guard.max_similarity={HIGHEST}"
    return (
        f"vimi-data crawl {{c.out}}/videos.jsonl --out {clips}\n"
        f"vimi-data crawl {{c.out}}/pictures.jsonl --out {pictures}\n"
        f"vimi-data build-index {pictures} --out {memory} --clip offline\n"
        f"vimi-data augment {clips} --memory {memory} --retriever bm25 -k {k} --out {prompts}{target}"
    )


@command(app, Job("pipeline.world.make:WorldConfig", then=_world))
def world(
    out: Out = None,
    size: Annotated[int | None, typer.Option(help="Side of the clips as they are trained on, pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    nouns: Annotated[int | None, typer.Option(help="Nouns for training.")] = None,
    unseen: Annotated[int | None, typer.Option(help="Nouns that training never sees.")] = None,
    distractors: Annotated[
        int | None, typer.Option(help="Documents for each noun that name it and show another thing.")
    ] = None,
    background: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern of the clips' backgrounds: plain, gradient, waves, stripes, clouds; repeat it."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same bytes.")] = None,
) -> Fields:
    """Make a small corpus in which only a retrieved picture tells what a noun looks like."""
    return {
        "out": out,
        "size_px": size,
        "frames": frames,
        "nouns": nouns,
        "unseen": unseen,
        "distractors": distractors,
        "backgrounds": background or None,
        "seed": seed,
    }


def _build(config: Any) -> str:
    return f"vimi-data build-index {{c.out}} --out {unused('memory')}{clip_option()}"


@command(app, Job("pipeline.clips.crawl:CrawlConfig", then=_build))
def crawl(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Folders, manifests, tars, Parquet files, URL lists or pages."),
    ] = None,
    out: Out = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A private or loopback host that may be fetched from.")
    ] = None,
) -> Fields:
    """Find clips and captions; every row leaves with a status and, if it failed, a reason."""
    fields: Fields = {"out": out, "fetch.allow_hosts": allow_host}
    if sources:
        from pipeline.clips.sources import source_from_path

        fields["sources"] = [source_from_path(source).model_dump() for source in sources]
    return fields


@command(app, Job("pipeline.clips.redrive:RedriveConfig", then=_build))
def redrive(
    clips: Annotated[str | None, typer.Argument(help="Folder that `vimi-data crawl` made.")] = None,
    out: Out = None,
) -> Fields:
    """Try again the rows of a crawl that a retry may cure; all others are carried over."""
    return {"clips": clips, "out": out}


@command(app, Job("pipeline.clips.caption:CaptionConfig", then=_build))
def caption(
    clips: Annotated[str | None, typer.Argument(help="Folder that `vimi-data crawl` made.")] = None,
    out: Out = None,
    model: Annotated[
        str | None, typer.Option(help="Image-text-to-text model of transformers: hub name or folder.")
    ] = None,
    which: Annotated[
        str | None, typer.Option(help="silent: clips without words; poor: also those of few; all.")
    ] = None,
) -> Fields:
    """Have a model write the captions that are missing or poor; the old ones are kept beside them."""
    return {"clips": clips, "out": out, "model": model, "which": which}


def _augment(config: Any) -> str:
    search = 'vimi-data search {c.out} "a dog on grass"'
    return f"{search}\nvimi-data augment {{c.clips[0]}} --memory {{c.out}} --out {unused('prompts')}"


@command(app, Job("pipeline.memory.build_index:BuildIndexConfig", then=_augment), name="build-index")
def build_index(
    clips: Clips = None,
    out: Out = None,
    clip: Annotated[
        str | None,
        typer.Option("--clip", help="open_clip model name, or `offline` for the one from PyPI wheels."),
    ] = None,
    grow: Annotated[
        bool | None, typer.Option("--grow", help="Add these tables to the memory that is there.")
    ] = None,
) -> Fields:
    """Embed clips and pictures with CLIP into a memory: LanceDB, in shards that captions are joined with."""
    return {"clips": clips or None, "out": out, "clip.name": clip, "grow": grow}


@command(app, Job("pipeline.memory.search:SearchConfig"))
def search(
    memory: Annotated[str | None, typer.Argument(help="Folder that `vimi-data build-index` made.")] = None,
    text: Annotated[str | None, typer.Argument(help="Words to look for.")] = None,
    image: Annotated[str | None, typer.Option(help="A picture to look for.")] = None,
    retriever: Retriever = None,
    against: Annotated[str | None, typer.Option(help="What is compared: see retrieve.against below.")] = None,
    k: Annotated[int | None, typer.Option("-k", help="How many documents.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the page of pictures.")] = None,
) -> Fields:
    """Look into a memory by words, a picture or both: a table here, pictures in a page."""
    return {
        "memory": memory,
        "text": text,
        "image": image,
        "out": out,
        "retrieve.retriever": retriever,
        "retrieve.against": against,
        "retrieve.k": k,
    }


@command(app, Job("pipeline.report.estimate:PlanConfig"))
def plan(
    documents: Annotated[int | None, typer.Option(help="Documents of the memory.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each machine.")] = None,
) -> Fields:
    """Estimate what a memory costs: hours, disk, memory, wall time; every number with its source."""
    return {"documents": documents, "nodes": nodes, "gpus_per_node": gpus}


STAGE1 = "runs/stage1"
"""Where the proposed pretraining goes, and the proposed finetuning starts."""


def _stage1(config: Any) -> str:
    return f"vimi-train stage1 {{c.out}} --out {unused(STAGE1)} {train_command('stage1', config.out)}"


@command(app, Job("pipeline.prompts.augment:AugmentConfig", then=_stage1))
def augment(
    clips: Clips = None,
    memory: Memory = None,
    out: Out = None,
    retriever: Retriever = None,
    k: Annotated[int | None, typer.Option("-k", help="Documents stored per caption.")] = None,
) -> Fields:
    """Pair every caption with in-context image-text examples: multimodal prompts as Parquet shards."""
    return {
        "clips": clips or None,
        "memory": memory,
        "out": out,
        "retrieve.retriever": retriever,
        "retrieve.k": k,
    }


EXAM = (
    "keep it out of training: vimi-data augment ... --set guard.exclude={c.out}/exclude.jsonl\n"
    "  score a run by it: vimi-train evaluate RUN --prompts {c.out} --out scores"
)


@command(app, Job("pipeline.prompts.benchmark:BenchmarkConfig", look=EXAM))
def benchmark(
    protocol: Annotated[
        str | None, typer.Argument(help="ucf101, msrvtt, personalization, or own: held-out rows of our data.")
    ] = None,
    source: Annotated[str | None, typer.Option("--from", help="Your copy of the data.")] = None,
    out: Out = None,
    memory: Annotated[
        str | None, typer.Option(help="Folder of build-index: the prompts get documents from it.")
    ] = None,
    retriever: Retriever = None,
    k: Annotated[int | None, typer.Option("-k", help="How many documents each prompt gets.")] = None,
) -> Fields:
    """Write a protocol's prompts as shards, and the list of what must not be trained on."""
    return {
        "protocol": protocol,
        "source": source,
        "out": out,
        "memory": memory,
        "retrieve.retriever": retriever,
        "retrieve.k": k,
    }


def _proof(report: "Report") -> str:
    """What was proved; a set that isn't valid ends the command with exit code 1."""
    if not report.is_valid:
        print("\n".join(report.lines()))
        raise typer.Exit(1)
    return "\n".join(report.lines())


@command(app, Job("pipeline.report.validate:ValidateConfig", run="validate", closing=_proof))
def validate(
    prompts: Shards = None,
    memory: Annotated[str | None, typer.Option(help="The memory, if it is no longer where it was.")] = None,
) -> Fields:
    """Prove a set of shards from scratch: hashes, pictures, targets, guard laws. Exit code 1 if not."""
    return {"prompts": prompts, "memory": memory}


def _stage2(config: Any) -> str:
    recipe = train_command("stage2", config.out)
    finetune = f"vimi-train stage2 {{c.out}} --from {STAGE1} --out {unused('runs/stage2')} {recipe}"
    if Path(STAGE1).exists():
        return finetune
    recipe = train_command("stage1", config.prompts)
    return f"vimi-train stage1 {{c.prompts}} --out {STAGE1} {recipe}\n{finetune}"


def _instruct(config: Any) -> str:
    return f"vimi-data instruct {{c.prompts}} --crops {{c.out}} --pairs mixed --out {unused('instructions')}"


@command(app, Job("pipeline.prompts.subjects.job:CropsConfig", then=_instruct))
def subjects(
    prompts: Prompts = None,
    out: Out = None,
    clip: Annotated[
        str | None,
        typer.Option("--clip", help="The CLIP that judges cut-outs: open_clip model name, or `offline`."),
    ] = None,
) -> Fields:
    """Cut out what captions name, once, as a table of crops: each phrase in each frame with its fate."""
    return {"prompts": prompts, "out": out, "subjects.clip.name": clip}


INSTRUCT = Job("pipeline.prompts.instruct:InstructConfig", then=_stage2)


@command(app, INSTRUCT)
def instruct(
    prompts: Prompts = None,
    out: Out = None,
    crops: Annotated[str | None, typer.Option(help="Folder that `vimi-data subjects` made.")] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Where pictures of words come from: in_pair, cross_clip or mixed.")
    ] = None,
) -> Fields:
    """Make the instruction tasks of stage 2, each with the pictures that it needs."""
    return {"prompts": prompts, "out": out, "crops": crops, "pairs": pairs}


ENCODE = Job("cli.encode:EncodeConfig")


@command(app, ENCODE)
def encode(
    prompts: Shards = None,
    out: Out = None,
    stage: Annotated[
        str | None, typer.Option("--for", help="Config of the training that will read them.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Workers at once.")] = None,
) -> tuple[Job, Fields]:
    """Run the frozen prompt encoder (and the autoencoder) over all shards once, instead of in every epoch."""
    from cli.encode import options_of, then

    fields = options_of(stage) if stage is not None else {}
    return replace(ENCODE, then=partial(then, stage)), {
        **fields,
        "prompts": prompts or fields.get("prompts"),
        "out": out,
        "num_workers": workers,
    }


def _claims(rows: list[dict[str, Any]]) -> str:
    from pipeline.world.evidence import table

    return table(rows)


@command(app, Job("pipeline.world.evidence:EvidenceConfig", closing=_claims, look="{c.out}/evidence.html"))
def judge(
    world: Annotated[str | None, typer.Option(help="Folder that `vimi-data world` made.")] = None,
    out: Out = None,
) -> Fields:
    """Judge sampled videos of a world by image statistics: which claims hold, with errors, and a page."""
    return {"world": world, "out": out}


def _page(place: str) -> str:
    return f"report: one page, works offline -> {shorten(place)}\n  open it in a browser"


@command(app, Job("pipeline.report:ReportConfig", closing=_page))
def report(
    out: Annotated[str | None, typer.Option("--out", "-o", help="The HTML file to write.")] = None,
    clips: Annotated[str | None, typer.Option(help="Folder of crawl.")] = None,
    memory: Annotated[str | None, typer.Option(help="Folder of build-index.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Folder of augment.")] = None,
    crops: Annotated[str | None, typer.Option(help="Folder of subjects.")] = None,
    instructions: Annotated[str | None, typer.Option(help="Folder of instruct.")] = None,
    run: Annotated[list[str] | None, typer.Option(help="Run folder of stage1 or stage2; repeat it.")] = None,
    samples: Annotated[list[str] | None, typer.Option(help="Folder of sample; repeat it.")] = None,
    scores: Annotated[list[str] | None, typer.Option(help="Folder of evaluate; repeat it.")] = None,
    evidence: Annotated[str | None, typer.Option(help="Folder of judge.")] = None,
) -> Fields:
    """One self-contained HTML page: what came in, what became of it, prompts, losses, videos."""
    return {
        "out": out,
        "clips": clips,
        "memory": memory,
        "prompts": prompts,
        "crops": crops,
        "instructions": instructions,
        "runs": run or None,
        "samples": samples or None,
        "scores": scores or None,
        "evidence": evidence,
    }
