"""What a run's folder says when the workers are gone: where it stood, why it stopped, its certificate."""

from infra.errors import TrainingError
from infra.storage import Certificate, exists, join, read_json, write_certificate
from model.training.checkpoint import latest_checkpoint, prune, read_facts
from model.training.stages import SPEED_ONLY, StageConfig
from model.training.telemetry import is_sampling, is_validation, read_metrics, say


def say_where_it_stands(config: StageConfig) -> int:
    """The position that the run continues from; 0 for a fresh one."""
    last = latest_checkpoint(config.out)
    if last is None:
        return 0
    position = int(read_facts(last)["position"])
    say(f"  resumes at {position:,} of {config.total_samples:,} samples")
    return position


def refuse_failed(run: str) -> None:
    place = join(run, "failure.json")
    if exists(place):
        raise TrainingError(read_json(place)["error"])


def has_arrived(config: StageConfig) -> bool:
    last = latest_checkpoint(config.out)
    return last is not None and int(read_facts(last)["position"]) >= config.total_samples


def tidy(config: StageConfig) -> None:
    """When all is seen: results that came after the workers left, checkpoints that waited for them."""
    from model.training.observe import read_results
    from model.training.report import collect, open_log, unshown

    records = read_metrics(config.out)
    known = {record["samples"] for record in records if is_validation(record)}
    shown = {record["samples"] for record in records if is_sampling(record)}
    if read_results(config.out, known) or unshown(config.out, shown):
        log = open_log(config, config.total_samples)
        collect(log, config.out, config.total_samples)
        log.close()
    prune(config.out, config.checkpoint.num_to_keep)


def certify(config: StageConfig, inputs: dict[str, str]) -> Certificate:
    """The run's certificate: samples seen, the last checkpoint and what it says of itself."""
    last = latest_checkpoint(config.out)
    if last is None:
        raise TrainingError(f"{config.out}: no checkpoint was committed")
    facts, final = read_facts(last), read_json(join(config.out, "final.json"))
    certificate = Certificate(
        job=config.stage,
        config_hash=config.hash(exclude={"out", "ray", "num_workers", *SPEED_ONLY}),
        num_in=config.total_samples,
        num_out=facts["position"],
        inputs=inputs,
        facts={"checkpoint": last.removeprefix(config.out + "/"), **final},
        wall_s=final["wall_s"],
    )
    write_certificate(config.out, certificate)
    return certificate
