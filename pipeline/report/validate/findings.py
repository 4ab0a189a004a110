"""What a validation asks, and what it finds."""

from collections import Counter
from dataclasses import dataclass, field

from pydantic import Field

from infra.config import Config


class ValidateConfig(Config):
    """What to prove."""

    prompts: str
    """Folder made by `vimi-data augment` or `vimi-data instruct`."""
    memory: str | None = None
    """Memory to check the guard's laws against; None = where the job says it was."""
    sample_targets: int = Field(default=64, ge=0)
    """Targets that are decoded, evenly over the set; all are measured. Ours."""
    max_picture_px: int = Field(default=4096, ge=1)
    """A picture with a longer side breaks the bound. Ours."""
    max_problems: int = Field(default=20, ge=1)
    """Problems of one kind that are told in full; all are counted."""


@dataclass
class Report:
    """What was checked, and what was found wrong."""

    checked: Counter[str] = field(default_factory=Counter)
    """What was looked at -> how many."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Kind -> the first few, in words."""
    counts: Counter[str] = field(default_factory=Counter)
    """Kind -> all."""
    max_problems: int = 20

    @property
    def is_valid(self) -> bool:
        return not self.counts

    def add(self, kind: str, words: str) -> None:
        self.counts[kind] += 1
        told = self.problems.setdefault(kind, [])
        if len(told) < self.max_problems:
            told.append(words)

    def lines(self) -> list[str]:
        """For a terminal: what was proved, then what was not."""
        found = [f"checked {count:,} {what}" for what, count in self.checked.items()]
        for kind, told in self.problems.items():
            found.append(f"{kind}: {self.counts[kind]:,}")
            found += [f"  {words}" for words in told]
        return [*found, "valid" if self.is_valid else f"NOT valid: {sum(self.counts.values()):,} problems"]
