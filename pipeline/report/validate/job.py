"""`vimi-data validate`: proves a set of prompt shards, trusting nothing that the job said about itself.

certificate    there, complete, in = out + filtered + dead
files          each with its certified size and sha256; none missing, none that is not listed
schema         every shard has the columns and types of `schema.PROMPTS`
rows           row counts, meta.parquet, unique ids, ids recomputed from their content
segments       order, ranks, scores, flags, every picture decodable and of bounded size
targets        sizes add up for all; a sample is decoded
guard          each law again, from the memory and the exclusion file
"""

from collections import Counter

from infra.errors import ConfigError, DataError
from infra.storage import Certificate, absolute, read_certificate
from pipeline.report.validate.files import check_files, check_meta, check_rejected, read_rows
from pipeline.report.validate.findings import Report, ValidateConfig
from pipeline.report.validate.laws import check_guard
from pipeline.report.validate.prompts import check_prompt, check_target
from pipeline.shards import META_FILE, SHARD_JOBS


def validate(config: ValidateConfig) -> Report:
    """Check everything; problems are collected, not raised.

    Raises:
        ConfigError: there is nothing certified at that place.
    """
    uri, report = absolute(config.prompts), Report(max_problems=config.max_problems)
    certificate = _certificate(uri, report)
    whole = check_files(uri, certificate, report)
    if META_FILE not in whole:
        return report
    check_meta(uri, certificate, whole, report)
    check_rejected(uri, certificate, whole, report)
    shards = [entry.path for entry in certificate.files if entry.path.startswith("part-")]
    step = max(1, certificate.num_out // max(1, config.sample_targets))
    seen: Counter[str] = Counter()
    number = 0
    for name in (name for name in shards if name in whole):
        for row in read_rows(uri, name):
            seen[row["prompt_id"]] += 1
            check_prompt(row, f"{name} {row['prompt_id']}", config, report)
            if config.sample_targets and number % step == 0:
                check_target(row, f"{name} {row['prompt_id']}", report)
            number += 1
    report.checked["prompts"] = number
    for twice in (key for key, count in seen.items() if count > 1):
        report.add("ids", f"{twice} stands {seen[twice]} times")
    check_guard(uri, [name for name in shards if name in whole], config, certificate, report)
    return report


def _certificate(uri: str, report: Report) -> Certificate:
    try:
        certificate = read_certificate(uri)
    except DataError as error:
        raise ConfigError(str(error), cure="make the shards again") from None
    if certificate is None or certificate.job not in SHARD_JOBS:
        made = f"was made by {certificate.job!r}" if certificate else "holds no certificate"
        raise ConfigError(
            f"{uri} {made}",
            legal="the output folder of `vimi-data augment` or `vimi-data instruct`",
            cure="run that command first, or again if it was stopped",
        )
    try:
        certificate.check()
    except DataError as error:
        report.add("certificate", str(error))
    report.checked["certificate"] = 1
    return certificate
