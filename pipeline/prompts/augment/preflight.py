"""What is refused before anything starts: inputs that are missing, foreign, empty or of another CLIP."""

from dataclasses import dataclass

from infra.errors import ConfigError
from infra.storage import Certificate, join, require_certificate
from pipeline.memory import Memory, open_memory
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.retrieve.join import uses_arrays
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.workbench import clip_config
from pipeline.prompts.augment.worker import good_rows, has_caption
from pipeline.prompts.guard.exclusion import read_exclusion
from pipeline.schema import content_id

LOOKED_AT = 256  # rows of each table that tell whether its clips are documents of the memory


@dataclass(frozen=True)
class Inputs:
    """What preflight found: certified inputs."""

    clips: list[tuple[str, Certificate]]
    memory: Memory
    hashes: dict[str, str]


def check(config: AugmentConfig) -> Inputs:
    """Refuse what can be refused before Ray starts.

    Raises:
        ConfigError: an input that is missing, foreign, empty or built with another CLIP.
    """
    clips = []
    for uri in config.clips:
        certificate = require_certificate(uri, job="crawl", made_by="vimi-data crawl")
        clips.append((uri, certificate))
    if not sum(certificate.num_out for _, certificate in clips):
        raise ConfigError(
            f"no usable clip in {', '.join(config.clips)}",
            cure="look at the reasons in the certificate, mend the corpus, crawl again",
        )
    memory = open_memory(config.memory, version=config.memory_version)
    if not memory.num_documents:
        raise ConfigError(f"the memory {config.memory} is empty", cure="build it from a corpus")
    _check_clip(config, clips, memory)
    if not uses_arrays(config.retrieve, memory.num_documents):
        from pipeline.memory.retrieve.lance import check_indexes

        check_indexes(memory, config.retrieve)
    hashes = {f"clips-{n}": certificate.content_hash() for n, (_, certificate) in enumerate(clips)}
    hashes["memory"] = content_id(memory.version, memory.model_hash)
    if config.guard.exclude is not None:
        listed = read_exclusion(config.guard.exclude, source_pattern=config.guard.source_pattern)
        groups = (listed.ids, listed.hashes, listed.sources, listed.phashes)
        hashes["exclude"] = content_id(*(str(sorted(group)) for group in groups))
    return Inputs(clips, memory, hashes)


def _check_clip(config: AugmentConfig, clips: list[tuple[str, Certificate]], memory: Memory) -> None:
    there = memory.certificate.facts.get("model", {}).get("name")
    wanted = config.clip
    is_file = wanted is not None and wanted.name.endswith(".json")  # its identity shows when it is loaded
    if wanted is not None and there is not None and there != wanted.name and not is_file:
        raise ConfigError(
            f"clip {wanted.name!r}, but the memory {memory.uri} was embedded with {there!r}",
            legal="the memory's own CLIP",
            cure="leave clip out, or build a memory with that CLIP",
        )
    if wanted is not None or needs_clip(config, clips, memory):
        from infra.clip.load import check_clip

        try:
            check_clip(clip_config(config, memory))
        except ConfigError as error:
            raise ConfigError(
                f"some clips are not in the memory, so a CLIP is needed to guard them: {error}",
                cure="set clip to where its weights lie; or, with retriever bm25, set vectors to stored",
            ) from None


def needs_clip(config: AugmentConfig, clips: list[tuple[str, Certificate]], memory: Memory) -> bool:
    """Will a worker have to load the CLIP? Judged by the first rows of each table."""
    if not config.retrieve.k or (config.vectors == "stored" and config.retrieve.retriever == "bm25"):
        return False
    if config.retrieve.retriever != "bm25" and config.retrieve.query_dropout_frac:
        return True
    for uri, certificate in clips:
        part = next((f for f in certificate.files if f.path.startswith("part-") and f.rows), None)
        if part is None:
            continue
        rows = good_rows(join(uri, part.path), 0, min(part.rows, LOOKED_AT))
        ids = {row_doc_id(row) for row in rows if has_caption(row)}
        if len(memory.rows(sorted(ids), ["doc_id"])) < len(ids):
            return True
    return False
