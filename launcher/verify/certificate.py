"""What was proven, as JSON: enough to know what it says of a run, and what it does not say.

A certificate names the versions and the configuration (by a fingerprint of everything that shapes a layout's numbers),
the layout, what was shrunk or dropped, and every comparison with its numbers. An error that is not a number is null.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher import config as configuration
from launcher.config import RunConfig
from launcher.verify.diagnose import Diagnosis
from launcher.verify.matrix import Row
from launcher.verify.proof import Check, Proof
from launcher.verify.shrink import Shrunk
from parallel.checkpoint.manifest import fingerprint, versions

FORMAT_VERSION = 1
_SECTIONS = ("model", "train", "parallel", "precision", "optimizer")
"""What shapes the numbers of a layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proven:
    """A layout, small, and what came of its proofs."""

    shrunk: Shrunk
    proofs: Sequence[Proof]
    diagnosis: Diagnosis | None
    """Of the first proof that failed."""

    @property
    def passed(self) -> bool:
        return all(proof.passed for proof in self.proofs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A row of a list, or the one layout that was asked for."""

    row: Row
    proven: Sequence[Proven]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(each.passed for each in self.proven)

    @property
    def dropped(self) -> list[str]:
        """What the proofs do not have any more, a phrase each."""
        return list(dict.fromkeys(phrase for each in self.proven for phrase in each.shrunk.dropped))


def certificate(results: Sequence[Result], *, strict: bool, seconds: float) -> dict[str, Any]:
    """The whole certificate, JSON-able."""
    return {
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "passed": all(accepted(result, strict=strict) for result in results),
        "strict": strict,
        "seconds": round(seconds, 2),
        "layouts": [_layout(result, strict=strict) for result in results],
    }


def accepted(result: Result, *, strict: bool) -> bool:
    """Whether a layout is proven, with `strict` also completely."""
    return result.passed and not (strict and result.dropped)


def _layout(result: Result, *, strict: bool) -> dict[str, Any]:
    row = result.row
    values = configuration.to_dict(row.config)
    by = "itself" if len(result.proven) == 1 else "all its dimensions at smaller degrees, and each pair of them"
    return {
        "name": row.name,
        "ranks": row.ranks,
        "data_parallel": data_parallel(row.config, row.ranks),
        "parallel": values["parallel"],
        "configuration_fingerprint": fingerprint({name: values[name] for name in _SECTIONS}),
        "passed": accepted(result, strict=strict),
        "proven_by": by,
        "dropped": result.dropped,
        "seconds": round(result.seconds, 2),
        "proofs": [_proven(each) for each in result.proven],
    }


def data_parallel(config: RunConfig, ranks: int) -> int:
    """Data-parallel ranks."""
    layout = config.parallel
    return ranks // (layout.tensor * layout.pipeline * layout.context)


def _proven(proven: Proven) -> dict[str, Any]:
    shrunk = proven.shrunk
    return {
        "dimensions": shrunk.name,
        "ranks": shrunk.ranks,
        "data_parallel": data_parallel(shrunk.config, shrunk.ranks),
        "configuration": {name: configuration.to_dict(shrunk.config)[name] for name in _SECTIONS},
        "shrunk": [asdict(change) for change in shrunk.changes],
        "dropped": list(shrunk.dropped),
        "passed": proven.passed,
        "runs": [_run(proof) for proof in proven.proofs],
        "likely_cause": proven.diagnosis.cause if proven.diagnosis else None,
        "smallest_failing": proven.diagnosis.smallest if proven.diagnosis else None,
    }


def _run(proof: Proof) -> dict[str, Any]:
    found = proof.comparison
    return {
        "name": proof.name,
        "passed": proof.passed,
        "crash": found.crash,
        "checks": [_check(check) for check in found.checks],
        "held_bytes": {kind: {"rank": rank, "alone": alone} for kind, (rank, alone) in found.held.items()},
        "seconds": round(found.seconds, 2),
    }


def _check(check: Check) -> Mapping[str, Any]:
    return {
        "what": check.what,
        "compared": check.compared,
        "worst": check.worst,
        "error": check.error if math.isfinite(check.error) else None,
        "limit": check.limit,
        "passed": check.passed,
    }
