"""`bloomery verify`: the computing half. Proves each layout in worlds forked from this process."""

import time
from collections.abc import Sequence

from launcher.verbs.verify import VerifyJob
from launcher.verify.certificate import Proven, Result, accepted, certificate
from launcher.verify.diagnose import Diagnosis, diagnose
from launcher.verify.matrix import Row
from launcher.verify.proof import Proof, proofs
from launcher.verify.show import Shown
from launcher.verify.shrink import Shrunk
from parallel.common.files import write_json


def work(job: VerifyJob) -> int:
    """Proves, shows and certifies; 1 if anything is wrong, with `strict` also if anything was dropped."""
    started = time.monotonic()
    shown = Shown(total=len(job.rows))
    results: list[Result] = []
    for row in job.rows:
        result = prove_row(row, shown=None if job.is_list else shown)
        results.append(result)
        if job.is_list:
            shown.line(result, strict=job.strict)
        else:
            shown.verdict(result, strict=job.strict)
    seconds = time.monotonic() - started
    if job.is_list:
        shown.total(results, strict=job.strict, seconds=seconds)
    if job.certificate is not None:
        write_json(job.certificate, certificate(results, strict=job.strict, seconds=seconds))
    return 0 if all(accepted(result, strict=job.strict) for result in results) else 1


def prove_row(row: Row, shown: Shown | None = None) -> Result:
    """Runs all proofs of a row, and finds out why the first one failed that did."""
    started = time.monotonic()
    proven: list[Proven] = []
    for shrunk in row.proofs:
        if shown is not None:
            shown.layout(row, shrunk)
        proven.append(_prove(shrunk, shown))
    return Result(row=row, proven=proven, seconds=time.monotonic() - started)


def _prove(shrunk: Shrunk, shown: Shown | None) -> Proven:
    found: list[Proof] = []
    for proof in proofs(shrunk):
        found.append(proof)
        if shown is not None:
            shown.proof(proof)
    return Proven(shrunk=shrunk, proofs=found, diagnosis=_why(found))


def _why(found: Sequence[Proof]) -> Diagnosis | None:
    failed = next((proof.comparison for proof in found if not proof.passed), None)
    return diagnose(failed) if failed is not None else None
