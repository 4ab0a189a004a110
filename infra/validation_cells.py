"""Names of the numbers of a training's validation, in its records and trackers: a grid of cells.

    val/video documents right            loss, mean over the noise levels
    val/video documents none q0.9        loss at the quantile 0.9 of the noise levels
    val/video none - right q0.9          mean difference of these two over rows with documents
    val/video none - right q0.9 error    its standard error
    val/video rows                       how many rows

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
CELL = re.compile(
    r"(?P<of>.+?) (?:documents (?P<loss>\w+)|(?P<gain>\w+) - right)"
    r"(?: q(?P<quantile>[\d.]+))?(?P<error> error)?"
)


@dataclass(frozen=True)
class Cell:
    """What one number of a validation is of."""

    of: str
    """A medium, and in stage 2 also one of its tasks: `video`, `video text_to_video`."""
    documents: str
    """One of DOCUMENTS."""
    quantile: float | None = None
    """Of the training's noise levels; None = the mean over those that validation takes."""
    is_gain: bool = False
    """The difference to the loss with the right documents, in place of the loss itself."""
    is_error: bool = False
    """The standard error of that difference."""

    @property
    def name(self) -> str:
        """The number's key in a record."""
        what = f"{self.documents} - right" if self.is_gain else f"documents {self.documents}"
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
    documents = gain or found["loss"]
    if documents not in DOCUMENTS:
        return None
    return Cell(
        of=found["of"],
        documents=documents,
        quantile=float(quantile) if quantile else None,
        is_gain=gain is not None,
        is_error=found["error"] is not None,
    )


def cells_of(record: Mapping[str, Any]) -> dict[Cell, float]:
    """The cells of a record, in its order."""
    found = ((cell_of(name), value) for name, value in record.items())
    return {cell: value for cell, value in found if cell is not None and isinstance(value, int | float)}


def validation_losses(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of a medium's losses over all noise levels: what is drawn beside the training's."""
    found = {cell for record in records for cell in cells_of(record) if cell.quantile is None}
    losses = [cell for cell in found if not cell.is_gain and " " not in cell.of]
    ranked = sorted(losses, key=lambda cell: (cell.of != "video", cell.of, DOCUMENTS.index(cell.documents)))
    return [cell.name for cell in ranked]
