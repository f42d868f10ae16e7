"""Results of the checks of a potential, a sentence for each check."""

from __future__ import annotations

import dataclasses

from mdsens._util.tables import Shown

__all__ = ["Finding", "PotentialTest"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check of a potential.

    Attributes:
      check: name of the check.
      good: whether the potential passed the check.
      sentence: the result in words; if the potential did not pass, with a remedy.
    """

    check: str
    good: bool
    sentence: str


@dataclasses.dataclass(frozen=True, repr=False)
class PotentialTest(Shown):
    """The results of all checks of a potential.

    Attributes:
      potential: name of the potential.
      findings: the result of each check, and of the check of each declared breakpoint (a distance
        at which a derivative of the potential jumps or diverges).
    """

    potential: str
    findings: tuple[Finding, ...]

    @property
    def good(self) -> bool:
        """Whether the potential passed every check."""
        return all(finding.good for finding in self.findings)

    @property
    def bad(self) -> tuple[Finding, ...]:
        """The results of the checks that the potential did not pass."""
        return tuple(finding for finding in self.findings if not finding.good)

    @property
    def _title(self) -> str:  # type: ignore[override]
        verdict = "good" if self.good else f"{len(self.bad)} not good"
        return f"Potential test of {self.potential}: {verdict}"

    def _rows(self) -> list[tuple[str, str]]:
        return [(f.check, ("" if f.good else "NOT GOOD: ") + f.sentence) for f in self.findings]
