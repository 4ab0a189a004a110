"""`vimi-train sample`: hands the sampler what the pipeline retrieves for a user's prompt, as training had it.

The two floors don't know each other: the pipeline finds the documents of each caption, and this file hands them
over as rows. No Ray.
"""

from typing import Any

from infra.certificate import Certificate
from infra.errors import ConfigError
from infra.progress import say
from model.sampling import generate, plan
from model.sampling.documents import Found, made_with
from model.training.config import StageConfig
from pipeline.memory import Memory
from pipeline.prompts.user_prompt import UserRetrievalConfig, check_retrieval, open_retriever

SHOWN_CHARS = 19
"""Of a hash so much is shown; a memory's tag is as long."""


class SampleConfig(UserRetrievalConfig, plan.SampleConfig):
    """What to sample, and the memory that prompts in words get their documents from."""


def check(config: SampleConfig) -> str:
    """Refuse what can't work before anything is loaded; the plan in words."""
    memory = check_retrieval(config)
    if memory is None:
        return plan.check(config)
    _, base = plan.made_by(config)
    compare(config, base, memory)
    texts = plan.texts_to_retrieve(config, base)
    if not texts:
        raise ConfigError(
            "a memory, but no prompt in words that lacks documents",
            cure='give a prompt ("A dog runs."), or leave --memory out: rows of shards bring their documents',
        )
    words = plan.check(config.model_copy(update={"documents": "right"}))
    return f"{words}, documents by {config.retrieve.retriever} from {memory.version} of {memory.uri}"


def run(config: SampleConfig) -> Certificate:
    """Retrieve, then make the videos."""
    check(config)
    memory = check_retrieval(config)
    if memory is None:
        return generate.run(config)
    _, base = plan.made_by(config)
    for note in compare(config, base, memory):
        say(f"  note: {note}")
    return generate.run(config, retrieve(config, memory, plan.texts_to_retrieve(config, base)))


def retrieve(config: SampleConfig, memory: Memory, texts: list[str]) -> Found:
    """Caption -> its documents, as augment would store them."""
    rows = open_retriever(config, memory)(texts)
    empty = [row["caption"] for row in rows if not row["num_documents"]]
    if empty and config.retrieve.k:
        say(f"  note: {len(empty)} of {len(rows)} prompts found no document, such as {empty[0]!r}")
    return {row["caption"]: row for row in rows}


def compare(config: SampleConfig, base: StageConfig, memory: Memory) -> list[str]:
    """How what is retrieved now differs from what the run has learned with, a line each.

    Raises:
        ConfigError: it has learned without documents.
    """
    learned = max(base.documents)
    try:
        trained = made_with(base.prompts)
    except ConfigError:
        trained = {}
    if not learned or trained is None:
        cause = "documents: 0 in its config" if not learned else f"no prompt of {base.prompts} has any"
        raise ConfigError(
            f"{config.source} has learned without documents ({cause})",
            cure="leave --memory out, or train with prompts that augment has found documents for",
        )
    notes = []
    if not trained:
        notes.append(
            f"{base.prompts}, which the run was trained on, is gone: it can't be compared with this memory"
        )
    now: dict[str, Any] = {
        "memory_version": memory.version,
        "model_hash": memory.model_hash,
        "retriever": config.retrieve.retriever,
    }
    names = {"memory_version": "memory", "model_hash": "CLIP", "retriever": "retriever"}
    other = [
        f"{names[key]} {' or '.join(sorted(map(_short, there)))}, not {_short(now[key])}"
        for key, there in trained.items()
        if now[key] not in there
    ]
    if other:
        notes.append(f"the run has learned with documents of {'; '.join(other)}")
    wanted = config.num_documents or (config.retrieve.k if "k" in config.retrieve.model_fields_set else 0)
    if wanted > learned:
        used = "all are used" if config.num_documents else f"the best {learned} are used"
        notes.append(f"{wanted} documents are asked for, the run has learned with at most {learned}: {used}")
    return notes


def _short(name: str) -> str:
    """A name, or as much of a hash as tells it from others."""
    return name[:SHOWN_CHARS]
