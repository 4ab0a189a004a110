"""The videos that a run sampled while it trained, as they lie in its folder.

run/samples/samples-<position>/sample-000.mp4 sample-000.png (contact sheet) ... samples.json (last)
"""

from infra.storage import join, list_files, read_bytes, read_json

TITLE_CHARS = 60
"""Of a prompt, in the title of its sheet."""


def preview_uri(run: str, position: int) -> str:
    return join(run, "samples", f"samples-{position:012d}")


def sampled_positions(run: str) -> list[int]:
    """Positions whose videos are all there, in order."""
    places = list_files(join(run, "samples"), suffix="/samples.json")
    return [int(place.split("/")[-2].removeprefix("samples-")) for place in places]


def contact_sheets(run: str, position: int) -> dict[str, bytes]:
    """The sheets of one position as PNG, by number and prompt."""
    folder = preview_uri(run, position)
    return {
        f"{number} {' '.join(entry['prompt'].split())[:TITLE_CHARS]}": read_bytes(join(folder, entry["sheet"]))
        for number, entry in enumerate(read_json(join(folder, "samples.json"))["samples"])
    }
