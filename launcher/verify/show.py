"""What a person sees of a verification: a table for one layout, a line for each of a list; colours on a terminal."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from launcher.verify.certificate import Proven, Result, data_parallel
from launcher.verify.matrix import Row
from launcher.verify.proof import GRADIENTS, Check, Proof
from launcher.verify.shrink import Change, Shrunk
from parallel.common.units import format_bytes, format_duration

_STYLES = {"equal": "green", "proven": "green", "WRONG": "bold red", "dropped": "yellow"}


class Shown:
    """Prints as the proofs come in."""

    def __init__(self, *, total: int) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._total = total
        self._done = 0

    def layout(self, row: Row, shrunk: Shrunk) -> None:
        """The heading of a table."""
        parts = "all its dimensions" if shrunk is row.proofs[0] else "two of its dimensions"
        self._print(f"{shrunk.name} on {_ranks(shrunk.ranks)} ({parts}; {_features(shrunk)})")
        if shrunk.changes:
            self._print(f"  shrunk: {', '.join(map(_change, shrunk.changes))}")
        self._print(f"  {'':<16}{'compared':<18}{'':>4}  {'worst':<52} {'error':>8} {'limit':>8}")

    def proof(self, proof: Proof) -> None:
        """The lines of one run."""
        if proof.comparison.crash is not None:
            self._print(f"  {proof.name:<16}{proof.comparison.crash}", "WRONG")
        for number, check in enumerate(proof.comparison.checks):
            name = proof.name if number == 0 else ""
            verdict = "equal" if check.passed else "WRONG"
            line = f"  {name:<16}{check.what:<18}{check.compared:>4}  {check.worst or '':<52}"
            self._print(f"{line} {_number(check.error):>8} {_number(check.limit):>8}  {verdict}", verdict)
        if proof.comparison.case.config.parallel.zero_stage:
            held = [f"{kind} {_held(*both)}" for kind, both in proof.comparison.held.items() if any(both)]
            self._print(f"  {'':<16}held by a rank, of what one rank alone holds: {', '.join(held)}")

    def verdict(self, result: Result, *, strict: bool) -> None:
        """What came of the one layout that was asked for."""
        for proven in result.proven:
            self._failure(proven)
        for phrase in result.dropped:
            self._print(f"dropped: {phrase}", "dropped")
        row = result.row
        name = f"{row.name} on {_ranks(row.ranks)} ({data_parallel(row.config, row.ranks)} data parallel)"
        if result.passed and not (strict and result.dropped):
            how = "" if len(result.proven) == 1 else ", by all its dimensions at smaller degrees and by each pair"
            self._print(f"{name} is proven equal to one rank{how} in {format_duration(result.seconds)}", "proven")
        elif result.passed:
            self._print(f"{name} is proven but for what was dropped, which --strict does not accept", "WRONG")
        else:
            self._print(f"{name} is NOT equal to one rank ({format_duration(result.seconds)})", "WRONG")

    def line(self, result: Result, *, strict: bool) -> None:
        """One row of a list."""
        self._done += 1
        passed = result.passed and not (strict and result.dropped)
        place = f"[{self._done:>{len(str(self._total))}}/{self._total}]"
        found = ", ".join(
            f"{proof.name} {_number(_gradient(proof).error)}"
            for proof in result.proven[0].proofs
            if proof.comparison.checks
        )
        verdict = "proven" if passed else "WRONG"
        took = format_duration(result.seconds)
        line = f"{place} {result.row.name:<40} {result.row.ranks:>3} ranks  {verdict}  {took:>6}  {found}"
        self._print(line, verdict)
        for proven in result.proven:
            self._failure(proven)
        for phrase in result.dropped:
            self._print(f"      dropped: {phrase}", "dropped")

    def total(self, results: Sequence[Result], *, strict: bool, seconds: float) -> None:
        """The end of a list."""
        passed = sum(result.passed and not (strict and result.dropped) for result in results)
        verdict = "proven" if passed == len(results) else "WRONG"
        said = f"{passed} of {len(results)} layouts are proven equal to one rank"
        self._print(f"{said}, in {format_duration(seconds)}", verdict)

    def _failure(self, proven: Proven) -> None:
        if proven.diagnosis is None:
            return
        proof = next(proof for proof in proven.proofs if not proof.passed)
        wrong = [check for check in proof.comparison.checks if not check.passed]
        for check in wrong[:3]:
            of = f" of {check.worst}" if check.worst else ""
            said = f"error {_number(check.error)}, limit {_number(check.limit)}"
            self._print(f"  WRONG in {proof.name}: {check.what}{of} ({said})", "WRONG")
        self._print(f"  likely cause: {proven.diagnosis.cause}.")
        if proven.diagnosis.smallest is not None:
            self._print(f"  the smallest setting that shows it: {proven.diagnosis.smallest}")

    def _print(self, line: str, verdict: str | None = None) -> None:
        self._console.print(Text(line, style=_STYLES.get(verdict or "", "")))


def _gradient(proof: Proof) -> Check:
    return next(check for check in proof.comparison.checks if check.what == GRADIENTS)


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _held(rank: int, alone: int) -> str:
    return f"{format_bytes(rank)} of {format_bytes(alone)}" if alone else format_bytes(rank)


def _features(shrunk: Shrunk) -> str:
    layout = shrunk.config.parallel
    cut = layout.tensor > 1 and layout.sequence_parallel is not False
    features = [f"ZeRO-{layout.zero_stage}", *(["sequence parallel"] if cut else [])]
    return ", ".join(features)


def _change(change: Change) -> str:
    return f"{change.key} {change.was} -> {change.now}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN"
    return "0" if value == 0 else f"{value:.1e}"
