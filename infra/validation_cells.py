"""Names of the numbers of a training's validation, in its records and trackers: a grid of cells.

    val/video documents right                    loss, mean over the noise levels
    val/video documents none q0.9                loss at the quantile 0.9 of the noise levels
    val/video none - right q0.9                  mean difference of these two over rows with documents
    val/video none - right q0.9 error            its standard error
    val/video subject_driven references own      loss of a task with all that its prompts show
    val/video subject_driven none - own          what it rises by where they show nothing
    val/stage1 video documents right             in stage 2: of stage 1's rows, which it should still know
    val/video rows                               how many rows

What writes them and what plots them both ask here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from infra.run_folder import VALIDATION

Documents = Literal["right", "none", "shuffled"]
"""Whose retrieved documents a prompt is given: its own, none, or another's."""
DOCUMENTS: tuple[Documents, ...] = get_args(Documents)
AXES: dict[str, tuple[str, ...]] = {"documents": DOCUMENTS, "references": ("own", "none")}
"""What rows are given more or less of, and the choices, the best first. References are all that a task's prompt
shows: subjects, background, first frame, documents; without them their words are in their place.
"""
KEPT = "stage1 video"
"""What the cells of stage 1's rows are of, in a validation of stage 2."""
SINCE_START = f"{VALIDATION}{KEPT} since the start"
"""How much higher the loss of these rows is than before the first step; with ` error`, its standard error."""
CELL = re.compile(
    r"(?P<of>.+?) (?:(?P<axis>\w+) (?P<loss>\w+)|(?P<gain>\w+) - (?P<best>\w+))"
    r"(?: q(?P<quantile>[\d.]+))?(?P<error> error)?"
)


@dataclass(frozen=True)
class Cell:
    """What one number of a validation is of."""

    of: str
    """A medium, and in stage 2 also one of its tasks: `video`, `video text_to_video`; or KEPT."""
    given: str
    """One of the choices of its axis."""
    quantile: float | None = None
    """Of the training's noise levels; None = the mean over those that validation takes."""
    is_gain: bool = False
    """The difference to the loss with the axis' best choice, in place of the loss itself."""
    is_error: bool = False
    """The standard error of that difference."""
    axis: str = "documents"
    """One of AXES."""

    @property
    def name(self) -> str:
        """The number's key in a record."""
        what = f"{self.given} - {AXES[self.axis][0]}" if self.is_gain else f"{self.axis} {self.given}"
        level = "" if self.quantile is None else f" q{self.quantile:g}"
        return f"{VALIDATION}{self.of} {what}{level}{' error' if self.is_error else ''}"


def rows_name(of: str) -> str:
    """The key of how many rows the cells of a medium or task are over."""
    return f"{VALIDATION}{of} rows"


def cell_of(name: str) -> Cell | None:
    """The cell of a record's key; None for other numbers."""
    found = CELL.fullmatch(name.removeprefix(VALIDATION)) if name.startswith(VALIDATION) else None
    if found is None:
        return None
    quantile, gain = found["quantile"], found["gain"]
    named = (axis for axis, given in AXES.items() if found["axis"] == axis or found["best"] == given[0])
    axis = next(named, "")
    given = gain or found["loss"]
    if given not in AXES.get(axis, ()):
        return None
    return Cell(
        of=found["of"],
        given=given,
        quantile=float(quantile) if quantile else None,
        is_gain=gain is not None,
        is_error=found["error"] is not None,
        axis=axis,
    )


def cells_of(record: Mapping[str, Any]) -> dict[Cell, float]:
    """The cells of a record, in its order."""
    found = ((cell_of(name), value) for name, value in record.items())
    return {cell: value for cell, value in found if cell is not None and isinstance(value, int | float)}


def validation_losses(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of a medium's losses over all noise levels, and of stage 1's: drawn beside the training's."""
    found = {cell for record in records for cell in cells_of(record) if cell.quantile is None}
    losses = [
        cell
        for cell in found
        if cell.axis == "documents" and not cell.is_gain and (" " not in cell.of or cell.of == KEPT)
    ]
    order: tuple[str, ...] = DOCUMENTS
    ranked = sorted(losses, key=lambda cell: (cell.of != "video", cell.of, order.index(cell.given)))
    return [cell.name for cell in ranked]
