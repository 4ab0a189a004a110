"""`vimi-train`: prompt shards -> trained generator -> videos. Words only."""

from functools import partial
from typing import Annotated, Any

import typer

from cli.common import Fields, Job, Out, command, make_app
from cli.errors import run_app
from cli.recipes import refuse_bare, unused
from infra.config import read_yaml

app = make_app("Train the generator on prompt shards in two stages, sample videos from it, export it.")

Preset = Annotated[str | None, typer.Option(help="Backbone by name: see preset below.")]
Workers = Annotated[
    str | None, typer.Option("--workers", help="Training processes, or a range (1-8); default one per GPU.")
]
Base = Annotated[
    str | None,
    typer.Option(help="In place of RUN: a pretrained model as it is, folder or hub id of diffusers."),
]
Ema = Annotated[str | None, typer.Option(help="weights, a stored average, or power-<sigma_rel>.")]


def _sample(config: Any) -> str:
    return f'vimi-train sample {{c.out}} "A dog runs on grass." --out {unused("samples")}'


def main() -> None:
    run_app(app, "vimi-train")


@command(app, Job("model.training.driver:Stage1Config", then=_sample, bare=partial(refuse_bare, "stage1")))
def stage1(
    prompts: Annotated[str | None, typer.Argument(help="Folder that `vimi-data augment` made.")] = None,
    out: Out = None,
    preset: Preset = None,
    workers: Workers = None,
) -> Fields:
    """Pretrain on retrieval-augmented prompts; the same command resumes, exactly."""
    return {"prompts": prompts, "out": out, "preset": preset, "num_workers": workers}


@command(app, Job("model.training.driver:Stage2Config", then=_sample, bare=partial(refuse_bare, "stage2")))
def stage2(
    prompts: Annotated[str | None, typer.Argument(help="Folder that `vimi-data instruct` made.")] = None,
    out: Out = None,
    start: Annotated[str | None, typer.Option("--from", help="Run folder of stage1.")] = None,
    preset: Preset = None,
    workers: Workers = None,
) -> Fields:
    """Finetune a stage-1 run on the instruction tasks."""
    return {"prompts": prompts, "out": out, "start_from": start, "preset": preset, "num_workers": workers}


@command(
    app,
    Job(
        "cli.sample:SampleConfig",
        look="look at {c.out}/sample-000.png and .mp4",
    ),
)
def sample(
    run: Annotated[str | None, typer.Argument(help="Run folder of stage1 or stage2, or a checkpoint.")] = None,
    prompts: Annotated[list[str] | None, typer.Argument(help='"A <image> is playing in a <image>"')] = None,
    base: Base = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help='Picture for the next <image>, or "retrieved:its text=picture"; repeat it.'),
    ] = None,
    out: Out = None,
    prompts_file: Annotated[str | None, typer.Option(help="JSONL file of prompts.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Folder of build-index: prompts in words get documents from it.")
    ] = None,
    retriever: Annotated[
        str | None, typer.Option(help="Retriever by name: see retrieve.retriever below.")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", help="How many documents each prompt gets.")] = None,
    documents: Annotated[
        str | None, typer.Option(help="right, none or shuffled: whose documents each prompt gets.")
    ] = None,
    no_retrieval: Annotated[
        bool, typer.Option("--no-retrieval", help="The same prompts without documents.")
    ] = False,
    seed: Annotated[list[int] | None, typer.Option(help="One video for each prompt and seed.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight; 1 = none.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frame rate to condition on and to write.")] = None,
    ema: Ema = None,
    upsampler: Annotated[
        str | None, typer.Option(help="Run folder of an upsampler: the cascade's second stage.")
    ] = None,
) -> Fields:
    """Sample videos: an mp4 and a contact sheet each; the same command makes the same bytes."""
    words = [*(prompts or [])]
    if base is not None and run is not None:  # it has no run, so the first word is a prompt
        run, words = None, [run, *words]
    return {
        "run": run,
        "base": base,
        "prompts": words or None,
        "images": image or None,
        "out": out,
        "prompts_file": prompts_file,
        "memory": memory,
        "retrieve.retriever": retriever,
        "retrieve.k": k,
        "documents": "none" if no_retrieval else documents,
        "seeds": seed or None,
        "num_steps": steps,
        "guidance.weight": guidance,
        "fps": fps,
        "ema": ema,
        "upsampler.run": upsampler,
    }


def _scores(config: Any) -> str:
    return f"vimi-data report --scores {{c.out}} --out {unused('scores.html')}"


@command(app, Job("cli.evaluate:EvaluateConfig", then=_scores, look="look at {c.out}/scores.json"))
def evaluate(
    run: Annotated[
        str | None, typer.Argument(help="Run folder, or a checkpoint: its videos are sampled first.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="With RUN: prompt shards, such as `vimi-data benchmark` makes.")
    ] = None,
    base: Base = None,
    videos: Annotated[str | None, typer.Option(help="Folder of videos: anybody's, or of sample.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Real videos: a folder, or the output of crawl, augment or benchmark.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="By name, with commas: fvd,clip_t,flicker.")] = None,
    out: Out = None,
    allow_small_n: Annotated[
        bool | None, typer.Option("--allow-small-n", help="Score fewer than 256 videos, and mark the scores.")
    ] = None,
) -> Fields:
    """Score videos: FVD, CLIP-T and others, each with its interval, n and all that it depends on."""
    return {
        "run": run,
        "base": base,
        "prompts": prompts,
        "videos": videos,
        "against": against,
        "metrics": [name.strip() for name in metrics.split(",")] if metrics else None,
        "out": out,
        "allow_small_n": allow_small_n,
    }


@command(app, Job("model.sampling.export:ExportConfig"))
def export(
    run: Annotated[str | None, typer.Argument(help="Run folder, or a checkpoint.")] = None,
    out: Out = None,
    ema: Ema = None,
) -> Fields:
    """Write a checkpoint's weights as safetensors with their config; read back without difference."""
    return {"run": run, "out": out, "ema": ema}


@app.command()
def describe(
    preset: Annotated[str, typer.Option(help="Backbone by name; a wrong one lists them all.")] = "fit-500m",
    batch: Annotated[int, typer.Option(help="Samples per device, for the memory.", min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of one prompt.", min=1)] = 128,
    references: Annotated[
        int, typer.Option(help="Pictures of a prompt that the generator sees itself; 0 = none.", min=0, max=8)
    ] = 1,
    reference_px: Annotated[int, typer.Option(help="Their side.", min=4, max=4096)] = 224,
    reference_patch_px: Annotated[int, typer.Option(help="Side of a patch of them.", min=1, max=512)] = 16,
    config: Annotated[
        str | None, typer.Option(help="A stage's config with a pretrained backbone, in place of a preset.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Of that config: field=value.")] = None,
) -> None:
    """Parameters, tokens, FLOPs by part and memory of a generator, without building it."""
    from infra.errors import ConfigError

    if config is not None:
        from cli.describe import describe_training
        from cli.describe import render as page
        from model.training.config import Stage1Config, Stage2Config

        stage = Stage2Config if "start_from" in read_yaml(config) else Stage1Config
        found = stage.load(config, overrides=overrides or ())
        print(page(describe_training(found, batch=batch), recompute=found.parallel.recompute))
        return
    from model.cost import describe as measure
    from model.cost import render

    if reference_px % reference_patch_px:
        raise ConfigError(
            f"references of {reference_px} px in patches of {reference_patch_px}",
            legal=f"multiples of {reference_patch_px}",
        )
    seen = (references, reference_px, reference_px)
    sizes = {"prompt_tokens": prompt_tokens, "references": seen, "reference_patch": reference_patch_px}
    try:
        print(render(measure(preset, batch=batch, **sizes)))
    except ValueError as error:
        raise ConfigError(str(error), cure="choose one of the presets") from None
