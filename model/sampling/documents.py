"""Retrieved documents of the prompts that are sampled: their own, none, or those of another prompt.

The control that tells whether a model reads its documents is the same prompt and noise with the documents of
another one: *shuffled*. All else being equal, the three choices are paired, video by video.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from infra.pictures import PictureError, open_picture
from infra.validation_cells import Documents
from model.condition import Prompt
from model.data.batch import Role, read_prompt
from model.data.shards import open_parquet, open_shards
from model.prompt.select import documents, keep_documents, retrieved, with_retrieved
from model.sampling.requests import SampleRequest, describe_prompt, instructed, origins_in, prompt_hash

Found = Mapping[str, Mapping[str, Any]]
"""Caption -> what was retrieved for it: the columns segments and memory_version of a row of PROMPTS."""


def with_found(request: SampleRequest, row: Mapping[str, Any], *, instruct: bool) -> SampleRequest:
    """The request with the documents that were retrieved for it, where training has them.

    `row` is a row of PROMPTS, as augment would store it for the prompt's caption; `instruct` puts the
    instruction line of retrieved documents in front, unless there is one.
    """
    stored = read_prompt({"prompt_id": None, **row})
    prompt = with_retrieved(request.prompt, retrieved(stored))
    return replace(
        request,
        prompt=instructed(prompt) if instruct else prompt,
        origins=origins_in(row["segments"], stored, row["memory_version"]),
    )


def made_with(uri: str) -> dict[str, set[str]] | None:
    """What the documents of a folder of prompts were retrieved from: memory_version, model_hash, retriever.

    Returns:
        All values of the first row group with documents; None if no prompt has any.
    """
    origin = "segments.list.element.document.retriever"
    columns = ["num_documents", "memory_version", "model_hash", origin]
    for group in open_shards(uri).groups:
        table = open_parquet(group.uri).read_row_group(group.index, columns=columns)
        rows = [row for row in table.to_pylist() if row["num_documents"]]
        if rows:
            retrievers = {s["document"]["retriever"] for row in rows for s in row["segments"] if s["document"]}
            return {
                "memory_version": {row["memory_version"] for row in rows},
                "model_hash": {row["model_hash"] for row in rows},
                "retriever": retrievers,
            }
    return None


def cut_documents(request: SampleRequest, number: int) -> SampleRequest:
    """The request with its first `number` documents."""
    return replace(
        request, prompt=keep_documents(request.prompt, number), origins=request.origins[: max(number, 0)]
    )


def choose_documents(requests: Sequence[SampleRequest], choice: Documents, seed: int) -> list[SampleRequest]:
    """The requests with their own documents, with none, or each with those of another."""
    if choice == "right":
        return list(requests)
    if choice == "none":
        return [cut_documents(request, 0) for request in requests]
    givers = [requests[giver] for giver in derange(requests, seed)]
    return [
        replace(
            mine,
            prompt=with_retrieved(mine.prompt, retrieved(giver.prompt)),
            origins=giver.origins,
            documents_of=giver.prompt_id or describe_prompt(giver.prompt),
        )
        for mine, giver in zip(requests, givers, strict=True)
    ]


def derange(requests: Sequence[SampleRequest], seed: int) -> list[int]:
    """Whose documents each request gets: a permutation without a fixed point, a function of seed and prompts.

    Two prompts may have found the same document, which would be no control: such pairs are parted again
    wherever another pair can be made.
    """
    marks = [_marks(request.prompt) for request in requests]
    order = sorted(range(len(requests)), key=lambda n: _draw(requests[n], seed))
    giver = {mine: order[(place + 1) % len(order)] for place, mine in enumerate(order)}

    def clash(mine: int, other: int) -> bool:
        return mine == other or not marks[mine].isdisjoint(marks[other])

    for mine in order:
        if clash(mine, giver[mine]):
            for other in order:
                if not clash(mine, giver[other]) and not clash(other, giver[mine]):
                    giver[mine], giver[other] = giver[other], giver[mine]
                    break
    return [giver[mine] for mine in range(len(requests))]


def num_shared(requests: Sequence[SampleRequest], shuffled: Sequence[SampleRequest]) -> int:
    """How many of the shuffled requests still hold a document of their own."""
    pairs = zip(requests, shuffled, strict=True)
    return sum(not _marks(mine.prompt).isdisjoint(_marks(other.prompt)) for mine, other in pairs)


def _marks(prompt: Prompt) -> set[str | bytes | None]:
    """Texts and pictures of the documents: what two prompts have in common when they found the same thing."""
    return {part for segment in retrieved(prompt) for part in (segment.text, segment.image) if part}


def _draw(request: SampleRequest, seed: int) -> bytes:
    """Of the task and the clip, as its noise is: the same corpus in another folder has other prompt ids."""
    name = f"{request.task}/{request.clip_id}" if request.clip_id else prompt_hash(request.prompt)
    return hashlib.sha256(f"{seed}/{name}/documents".encode()).digest()


def document_pictures(name: str, prompt: Prompt) -> dict[str, bytes]:
    """File beside the video `name` -> picture of a document, best first, as the model is given it."""
    found = {}
    for rank, places in enumerate(documents(prompt), start=1):
        for image in (prompt[place].image for place in places):
            if image:
                found[f"{name}-retrieved-{rank}.{ending_of(image)}"] = image
    return found


def ending_of(image: bytes) -> str:
    """Of a file that holds the picture."""
    try:
        return (open_picture(image).format or "bin").lower()
    except PictureError:
        return "bin"


def keep_segments(name: str, prompt: Prompt) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The segments as plain values, but for the documents, which `describe_documents` tells of.

    The pictures' files begin with `name`, that of the video's without ending.

    Returns:
        For each segment its type, role, text and the name of its picture's file; and the files.
    """
    segments, files = [], {}
    for segment in prompt:
        if segment.role == Role.RETRIEVED:
            continue
        file = None
        if segment.image is not None:
            file = f"{name}-{segment.role}-{len(files) + 1}.{ending_of(segment.image)}"
            files[file] = segment.image
        segments.append({"type": segment.type, "role": segment.role, "text": segment.text, "picture": file})
    return segments, files


def describe_documents(name: str, request: SampleRequest) -> list[dict[str, Any]]:
    """What samples.json says of each document, best first: origin, text, file of its picture."""
    found = []
    files = {file.partition(".")[0]: file for file in document_pictures(name, request.prompt)}
    for rank, places in enumerate(documents(request.prompt), start=1):
        text = next((s.text for s in (request.prompt[place] for place in places) if s.type == "text"), None)
        origin = request.origins[rank - 1] if rank <= len(request.origins) else {"rank": rank}
        found.append({**origin, "text": text, "picture": files.get(f"{name}-retrieved-{rank}")})
    return found
