"""Result of the check of a method."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """Result of one test.

    Attributes:
        kind: what was tested: "purity", "ranks", ...
        passed: whether the method passed; None if it could not be tested here.
        sentence: what holds, or what is broken and how to fix it.
    """

    kind: str
    passed: bool | None
    sentence: str


@dataclass(frozen=True)
class Report:
    """Results of all tests of a method.

    Attributes:
        method: name of the class.
        options: options with which it was made.
        findings: one per test, failures included.
    """

    method: str
    options: dict[str, Any]
    findings: list[Finding]

    @property
    def failures(self) -> list[Finding]:
        """Findings of the tests that failed."""
        return [finding for finding in self.findings if finding.passed is False]

    @property
    def passed(self) -> bool:
        """Whether no test failed."""
        return not self.failures

    def json(self) -> dict[str, Any]:
        """Return the report as a plain dict."""
        findings = [vars(finding) for finding in self.findings]
        return {"method": self.method, "options": self.options, "passed": self.passed, "findings": findings}

    def __str__(self) -> str:
        words = {True: "ok", False: "FAILED", None: "not tested"}
        return "\n".join(f"{finding.kind} ({words[finding.passed]}): {finding.sentence}" for finding in self.findings)


class MethodError(AssertionError):
    """A method failed a test; the message holds the sentence of every failure.

    Args:
        report: the report.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        lines = [f"{report.method} fails {len(report.failures)} of {len(report.findings)} tests:"]
        super().__init__("\n".join([*lines, *(f"- {f.kind}: {f.sentence}" for f in report.failures)]))
