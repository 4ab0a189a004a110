"""`vimi-train`: prompt shards -> trained generator -> videos. Words only."""

from typing import Annotated

import typer

from cli.common import ConfigPath, DryRun, Out, Overrides, execute, make_app, run_app, shorten

app = make_app("Train the generator on prompt shards in two stages, sample videos from it, export it.")
Preset = Annotated[str | None, typer.Option(help="fit-tiny, fit-small, fit-500m, fit-3.9b, dit-…")]
Workers = Annotated[
    str | None, typer.Option("--workers", help="Training processes, or a range (1-8); default one per GPU.")
]
Ema = Annotated[str | None, typer.Option(help="weights, a stored average, or power-<sigma_rel>.")]


def main() -> None:
    run_app(app, "vimi-train")


@app.command()
def stage1(
    prompts: Annotated[str | None, typer.Argument(help="Folder that `vimi-data augment` made.")] = None,
    out: Out = None,
    preset: Preset = None,
    workers: Workers = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Pretrain on retrieval-augmented prompts; the same command resumes, exactly."""
    execute(
        "model.training.train",
        "Stage1Config",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options={"prompts": prompts, "out": out, "preset": preset, "num_workers": workers},
        following=lambda c: f'vimi-train sample {shorten(c.out)} "A dog runs on grass." --out samples',
    )


@app.command()
def stage2(
    prompts: Annotated[str | None, typer.Argument(help="Folder that `vimi-data instruct` made.")] = None,
    out: Out = None,
    start: Annotated[str | None, typer.Option("--from", help="Run folder of stage1.")] = None,
    preset: Preset = None,
    workers: Workers = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Finetune a stage-1 run on the three instruction tasks."""
    named = {"prompts": prompts, "out": out, "start_from": start, "preset": preset, "num_workers": workers}
    execute(
        "model.training.train",
        "Stage2Config",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options=named,
        following=lambda c: f'vimi-train sample {shorten(c.out)} "A dog runs on grass." --out samples',
    )


@app.command()
def sample(
    run: Annotated[str | None, typer.Argument(help="Run folder of stage1 or stage2, or a checkpoint.")] = None,
    prompts: Annotated[list[str] | None, typer.Argument(help='"A <image> is playing in a <image>"')] = None,
    image: Annotated[list[str] | None, typer.Option(help="Picture for the next <image>; repeat it.")] = None,
    out: Out = None,
    prompts_file: Annotated[str | None, typer.Option(help="JSONL file of prompts.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="One video for each prompt and seed.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight; 1 = none.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frame rate to condition on and to write.")] = None,
    ema: Ema = None,
    upsampler: Annotated[
        str | None, typer.Option(help="Run folder of an upsampler: the cascade's second stage.")
    ] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Sample videos: an mp4 and a contact sheet each; the same command makes the same bytes."""
    execute(
        "model.sampling.generate",
        "SampleConfig",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options={
            "run": run,
            "prompts": prompts or None,
            "images": image or None,
            "out": out,
            "prompts_file": prompts_file,
            "seeds": seed or None,
            "num_steps": steps,
            "guidance.weight": guidance,
            "fps": fps,
            "ema": ema,
            "upsampler.run": upsampler,
        },
        following=lambda c: f"open {shorten(c.out)}/sample-000.png, or sample-000.mp4 beside it",
    )


@app.command()
def export(
    run: Annotated[str | None, typer.Argument(help="Run folder, or a checkpoint.")] = None,
    out: Out = None,
    ema: Ema = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Write a checkpoint as safetensors in a diffusers-style folder; read back without difference."""
    execute(
        "model.sampling.export",
        "ExportConfig",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options={"run": run, "out": out, "ema": ema},
    )


@app.command()
def describe(
    preset: Annotated[str, typer.Option(help="fit-tiny, fit-small, fit-500m, fit-3.9b, …")] = "fit-500m",
    batch: Annotated[int, typer.Option(help="Samples per device, for the memory.", min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of one prompt.", min=1)] = 128,
) -> None:
    """Parameters, tokens, FLOPs by part and memory of a generator, without building it."""
    from infra.errors import ConfigError
    from model.cost.describe import describe as measure
    from model.cost.describe import render

    try:
        print(render(measure(preset, batch=batch, prompt_tokens=prompt_tokens)))
    except ValueError as error:
        raise ConfigError(str(error), cure="choose one of the presets") from None
