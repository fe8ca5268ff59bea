"""What `vlm.check()` found, line by line, as a table that says how to mend what failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, how it stands, what was found, and the mend."""

    name: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What `vlm.check()` returns: print it, or ask `ok`.

    Attributes:
        model: the attached model in words.
        checks: all lines, in the order in which they were made.
    """

    model: str
    checks: list[Check] = field(default_factory=list[Check])

    @property
    def ok(self) -> bool:
        """Whether nothing failed; notes are no failures."""
        return all(check.state != "failed" for check in self.checks)

    def __str__(self) -> str:
        """Draw a plain table; the mend stands under each line that needs one."""
        wide = max(len(check.name) for check in self.checks)
        lines = [self.model]
        for check in self.checks:
            lines.append(f"  {check.state:<6}  {check.name:<{wide}}  {check.found}")
            lines += [f"  {'':<6}  {'':<{wide}}  mend: {check.mend}"] if check.mend else []
        return "\n".join([*lines, "all checks passed" if self.ok else "some checks failed"])
