"""`vimi-data`: corpus -> clips -> memory -> prompts, and looking at what was made. Words only."""

from typing import Annotated

import typer

from cli.common import ConfigPath, DryRun, Out, Overrides, execute, make_app, resolve, run_app, shorten

app = make_app("Build the data: crawl clips, index a memory, retrieve for every caption, write prompt shards.")
Retriever = Annotated[str | None, typer.Option(help="bm25 (as the paper), clip or hybrid.")]
Clip = Annotated[
    str | None,
    typer.Option("--clip", help="open_clip model name, or `offline` for the one from PyPI wheels."),
]


def main() -> None:
    run_app(app, "vimi-data")


@app.command()
def crawl(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Folders, manifests, tars, Parquet files, URL lists or pages."),
    ] = None,
    out: Out = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A private or loopback host that may be fetched from.")
    ] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Find clips and captions; every row leaves with a status and, if it failed, a reason."""
    options: dict[str, object] = {"out": out, "fetch.allow_hosts": allow_host}
    if sources:
        from pipeline.clips.sources import source_from_path

        options["sources"] = [source_from_path(source).model_dump() for source in sources]
    execute(
        "pipeline.clips.crawl",
        "CrawlConfig",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options=options,
        following=lambda c: f"vimi-data build-index {shorten(c.out)} --out memory",
    )


@app.command()
def redrive(
    clips: Annotated[str | None, typer.Argument(help="Folder that `vimi-data crawl` made.")] = None,
    out: Out = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Try again the rows of a crawl that a retry may cure; all others are carried over."""
    execute(
        "pipeline.clips.redrive",
        "RedriveConfig",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options={"clips": clips, "out": out},
        following=lambda c: f"vimi-data build-index {shorten(c.out)} --out memory",
    )


@app.command("build-index")
def build_index(
    clips: Annotated[list[str] | None, typer.Argument(help="Folders that `vimi-data crawl` made.")] = None,
    out: Out = None,
    clip: Clip = None,
    grow: Annotated[
        bool | None, typer.Option("--grow", help="Add these tables to the memory that is there.")
    ] = None,
    add_clip: Annotated[
        str | None, typer.Option(help="Embed the memory in --out with this CLIP too, in columns beside.")
    ] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Embed clips and pictures with CLIP into a LanceDB memory with a BM25 and a vector index."""
    if add_clip:
        execute(
            "pipeline.memory.build_index.add_clip",
            "AddClipConfig",
            path=config,
            overrides=overrides,
            dry_run=dry_run,
            options={"out": out, "clip.name": add_clip},
            following=lambda c: f'vimi-data search {shorten(c.out)} "a dog on grass" --clip {c.clip.name}',
        )
        return
    execute(
        "pipeline.memory.build_index",
        "BuildIndexConfig",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options={"clips": clips or None, "out": out, "clip.name": clip, "grow": grow},
        following=lambda c: (
            f'vimi-data search {shorten(c.out)} "a dog on grass"; or vimi-data augment {shorten(c.clips[0])} '
            f"--memory {shorten(c.out)} --out prompts"
        ),
    )


@app.command()
def search(
    memory: Annotated[str | None, typer.Argument(help="Folder that `vimi-data build-index` made.")] = None,
    text: Annotated[str | None, typer.Argument(help="Words to look for.")] = None,
    image: Annotated[str | None, typer.Option(help="A picture to look for.")] = None,
    retriever: Retriever = None,
    against: Annotated[str | None, typer.Option(help="clip, hybrid: document, image or text.")] = None,
    clip: Annotated[str | None, typer.Option(help="One of the memory's CLIPs by name; the first.")] = None,
    k: Annotated[int | None, typer.Option("-k", help="How many documents.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the page of pictures.")] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Look into a memory by words, a picture or both: a table here, pictures in a page."""
    options = {"memory": memory, "text": text, "image": image, "out": out, "clip": clip}
    chosen = {"retriever": retriever or "hybrid", "k": k or 12, "against": against}
    if config is None or retriever or k or against:
        options |= {f"retrieve.{name}": value for name, value in chosen.items()}
    job, loaded = resolve("pipeline.memory.search", "SearchConfig", config, overrides, options)
    job.check(loaded)
    if dry_run:
        print(loaded.to_yaml().rstrip())
        return
    job.run(loaded)


@app.command()
def plan(
    documents: Annotated[int | None, typer.Option(help="Documents of the memory.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each machine.")] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> None:
    """Estimate what a memory costs: hours, disk, memory, wall time; every number with its source."""
    options = {"documents": documents, "nodes": nodes, "gpus_per_node": gpus}
    job, loaded = resolve("pipeline.report.estimate", "PlanConfig", config, overrides, options)
    job.run(loaded)


@app.command()
def augment(
    clips: Annotated[list[str] | None, typer.Argument(help="Folders that `vimi-data crawl` made.")] = None,
    memory: Annotated[str | None, typer.Option(help="Folder that `vimi-data build-index` made.")] = None,
    out: Out = None,
    retriever: Retriever = None,
    k: Annotated[int | None, typer.Option("-k", help="Documents stored per caption.")] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Pair every caption with in-context image-text examples: multimodal prompts as Parquet shards."""
    execute(
        "pipeline.prompts.augment",
        "AugmentConfig",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options={
            "clips": clips or None,
            "memory": memory,
            "out": out,
            "retrieve.retriever": retriever,
            "retrieve.k": k,
        },
        following=lambda c: f"vimi-train stage1 {shorten(c.out)} --out runs/stage1",
    )


@app.command()
def validate(
    prompts: Annotated[str | None, typer.Argument(help="Folder of augment or instruct.")] = None,
    memory: Annotated[str | None, typer.Option(help="The memory, if it is no longer where it was.")] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Prove a set of shards from scratch: hashes, pictures, targets, guard laws. Exit code 1 if not."""
    options = {"prompts": prompts, "memory": memory}
    job, loaded = resolve("pipeline.report.validate", "ValidateConfig", config, overrides, options)
    if dry_run:
        print(loaded.to_yaml().rstrip())
        return
    found = job.validate(loaded)
    print("\n".join(found.lines()))
    if not found.is_valid:
        raise typer.Exit(1)


@app.command()
def instruct(
    prompts: Annotated[str | None, typer.Argument(help="Folder that `vimi-data augment` made.")] = None,
    out: Out = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Make the three instruction tasks of stage 2: subject-driven, video prediction, text-to-video."""
    execute(
        "pipeline.prompts.instruct",
        "InstructConfig",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options={"prompts": prompts, "out": out},
        following=lambda c: f"vimi-train stage2 {shorten(c.out)} --from runs/stage1 --out runs/stage2",
    )


@app.command()
def encode(
    prompts: Annotated[str | None, typer.Argument(help="Folder of augment or instruct.")] = None,
    out: Out = None,
    stage: Annotated[
        str | None, typer.Option("--for", help="Config of the training that will read them.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Workers at once.")] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Run the frozen prompt encoder (and the autoencoder) over all shards once, instead of in every epoch."""
    options: dict[str, object] = {}
    if stage is not None:
        from cli.encode import options_of

        options = options_of(stage)
    execute(
        "cli.encode",
        "EncodeConfig",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options={**options, "prompts": prompts or options.get("prompts"), "out": out, "num_workers": workers},
        following=lambda c: (
            f"vimi-train stage1 {shorten(c.prompts)} --set encodings={shorten(c.out)} --out run"
        ),
    )


@app.command()
def report(
    out: Annotated[str | None, typer.Option("--out", "-o", help="The HTML file to write.")] = None,
    clips: Annotated[str | None, typer.Option(help="Folder of crawl.")] = None,
    memory: Annotated[str | None, typer.Option(help="Folder of build-index.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Folder of augment.")] = None,
    instructions: Annotated[str | None, typer.Option(help="Folder of instruct.")] = None,
    run: Annotated[list[str] | None, typer.Option(help="Run folder of stage1 or stage2; repeat it.")] = None,
    samples: Annotated[list[str] | None, typer.Option(help="Folder of sample; repeat it.")] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """One self-contained HTML page: what came in, what became of it, prompts, losses, videos."""
    options = {
        "out": out,
        "clips": clips,
        "memory": memory,
        "prompts": prompts,
        "instructions": instructions,
        "runs": run or None,
        "samples": samples or None,
    }
    job, loaded = resolve("pipeline.report", "ReportConfig", config, overrides, options)
    job.check(loaded)
    if dry_run:
        print(loaded.to_yaml().rstrip())
        return
    page = job.run(loaded)
    print(f"report: one page, works offline -> {shorten(str(page))}\n  next: open it in a browser")
