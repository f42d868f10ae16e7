"""What the checks of a potential found: a sentence each."""

from __future__ import annotations

import dataclasses

from mdsens._util.tables import Shown

__all__ = ["Finding", "PotentialTest"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
      check: its name.
      good: whether the potential passed.
      sentence: what was found, and what to do where it is not good.
    """

    check: str
    good: bool
    sentence: str


@dataclasses.dataclass(frozen=True, repr=False)
class PotentialTest(Shown):
    """What the checks of a potential found.

    Attributes:
      potential: its name.
      findings: one a check, or one a breakpoint.
    """

    potential: str
    findings: tuple[Finding, ...]

    @property
    def good(self) -> bool:
        """Whether every check passed."""
        return all(finding.good for finding in self.findings)

    @property
    def bad(self) -> tuple[Finding, ...]:
        """The findings that are not good."""
        return tuple(finding for finding in self.findings if not finding.good)

    @property
    def _title(self) -> str:  # type: ignore[override]
        return f"Potential test of {self.potential}: {'good' if self.good else f'{len(self.bad)} not good'}"

    def _rows(self) -> list[tuple[str, str]]:
        return [(f.check, ("" if f.good else "NOT GOOD: ") + f.sentence) for f in self.findings]
