"""`vimi-train`: prompt shards -> trained generator -> videos. Words only."""

from typing import Annotated

import typer

from cli.common import ConfigPath, DryRun, Out, Overrides, execute, make_app, run_app, shorten

app = make_app("Train the generator on prompt shards in two stages, sample videos from it, export it.")
Preset = Annotated[str | None, typer.Option(help="fit-tiny, fit-small, fit-500m, fit-3.9b, …")]
Workers = Annotated[int | None, typer.Option("--workers", help="Training workers (GPUs, or CPU processes).")]


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
        "model.train",
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
    workers: Workers = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Finetune a stage-1 run on the three instruction tasks."""
    execute(
        "model.train",
        "Stage2Config",
        path=config,
        overrides=overrides,
        dry_run=dry_run,
        options={"prompts": prompts, "out": out, "start_from": start, "num_workers": workers},
        following=lambda c: f'vimi-train sample {shorten(c.out)} "A dog runs on grass." --out samples',
    )
