"""The likely cause of a failed proof, in one sentence, from what was measured.

The evidence is the smallest case that still fails (launcher/verify/simplify.py) and how its gradients lie to one
rank's: do copies that differ add up to the right gradient? are all wrong by one factor? are micro-batches weighed
wrongly, or missing? does the norm count something twice? `RULES` asks these in turn, the most specific first; the first
that has an answer gives it. A rule that explains by numbers checks that the numbers explain nearly everything.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from launcher.verify.compare import Tensors, norm
from launcher.verify.measure import Case, contributions
from launcher.verify.proof import COPIES, GRADIENTS, LOSS, NORM, Comparison, one_rank
from launcher.verify.simplify import Minimal, changed, data_size, minimal
from launcher.verify.world import run_world

_EXPLAINED = 0.05
"""Share of a difference that an explanation by numbers may leave open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Why a proof failed."""

    cause: str
    """One sentence, without its full stop."""
    smallest: str | None
    """The smallest setting that shows it; None where it does not run at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evidence:
    found: Comparison
    needed: frozenset[str]
    step: int
    """The first step with a wrong gradient; 0 where none is."""
    wrong: frozenset[str]
    """Names of the parameters whose gradient is beyond the limit in that step."""

    @property
    def case(self) -> Case:
        return self.found.case

    @property
    def ours(self) -> Tensors:
        return self.found.gradients[self.step].tensors

    @property
    def reference(self) -> Tensors:
        return self.found.reference[self.step]

    def flat(self, tensors: Tensors) -> np.ndarray:
        """The wrong parameters' tensors as one vector."""
        return np.concatenate([tensors[name].ravel() for name in sorted(self.wrong)])


def diagnose(failed: Comparison) -> Diagnosis:
    """Finds the smallest case that fails as this one did, and says what it looks like; a crash speaks for itself."""
    if failed.crash is not None:
        return Diagnosis(cause=f"the layout does not run: {failed.crash.splitlines()[0]}", smallest=None)
    smallest = minimal(failed)
    return Diagnosis(cause=_cause(smallest), smallest=_in_words(smallest))


def _in_words(smallest: Minimal) -> str:
    case = smallest.comparison.case
    ranks = f"{case.ranks} rank{'s' if case.ranks > 1 else ''}"
    dtype = str(case.dtype).removeprefix("torch.")
    return ", ".join([f"{ranks}, {dtype}", *sorted(smallest.needed)])


def _cause(smallest: Minimal) -> str:
    found = smallest.comparison
    wrong = [frozenset(found.wrong(step)) for step in range(len(found.gradients))]
    step = next((step for step, names in enumerate(wrong) if names), 0)
    evidence = _Evidence(found=found, needed=smallest.needed, step=step, wrong=wrong[step])
    return next(cause for rule in RULES if (cause := rule(evidence)) is not None)


def role(name: str) -> str:
    """What kind of parameter this is, in the plural or as a phrase."""
    for part, kind in (
        ("word_embeddings", "the embedding"),
        ("position_embeddings", "the table of positions"),
        ("output_layer", "the output layer"),
        ("router", "routers"),
        ("shared_experts", "shared experts"),
        ("experts", "experts"),
        ("norm", "norms"),
        ("bias", "biases"),
        ("self_attention", "attention"),
        ("mlp", "MLPs"),
    ):
        if part in name:
            return kind
    return name


def roles(names: frozenset[str]) -> str:
    """`norms and routers`."""
    kinds = sorted({role(name) for name in names})
    return " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)


def _norm_alone(evidence: _Evidence) -> str | None:
    """All gradients are right, and the norm is not theirs."""
    if evidence.wrong or NORM not in evidence.found.failing or COPIES in evidence.found.failing:
        return None
    excess = evidence.found.norms[0] ** 2 - norm(evidence.ours) ** 2
    for names in _groups(evidence.reference):
        times = excess / max(norm({name: evidence.reference[name] for name in names}) ** 2, 1e-300)
        if abs(times) > 0.5 and abs(times - round(times)) < _EXPLAINED:
            counted = "is left out of" if times < 0 else f"counts {round(times) + 1} times in"
            return f"every gradient is right, but that of {_called(names, evidence)} {counted} the gradient norm"
    return "every gradient is right, but the gradient norm is not that of these gradients"


def _called(names: frozenset[str], evidence: _Evidence) -> str:
    if names == frozenset(evidence.reference):
        return "every parameter"
    tied = evidence.case.config.model.tie_embeddings and roles(names) == "the embedding"
    return "the tied embedding" if tied else roles(names)


def _groups(tensors: Tensors) -> Iterator[frozenset[str]]:
    """Sets of parameters that go wrong together: of one role each, then all of one, two dimensions, then all."""
    by_role: dict[str, set[str]] = {}
    for name in tensors:
        by_role.setdefault(role(name), set()).add(name)
    yield from map(frozenset, by_role.values())
    yield frozenset(name for name, tensor in tensors.items() if tensor.ndim == 1)
    yield frozenset(tensors)


def _left_over(evidence: _Evidence) -> str | None:
    """The first step is right, and later ones are not."""
    if not evidence.step:
        return None
    before = evidence.flat(evidence.found.gradients[evidence.step - 1].tensors)
    difference = evidence.flat(evidence.ours) - evidence.flat(evidence.reference)
    if np.linalg.norm(difference - before) < _EXPLAINED * np.linalg.norm(difference):
        return f"the gradients of {roles(evidence.wrong)} still hold those of the step before: they were not cleared"
    return f"the first {evidence.step} steps are right, then the gradients of {roles(evidence.wrong)} are not"


def _parts_not_summed(evidence: _Evidence) -> str | None:
    """Copies of one parameter's gradient differ, and add up to the right one over the ranks of a dimension."""
    copies = evidence.found.gradients[evidence.step].copies
    if not copies:
        return None
    for dimension in ("tensor", "pipeline", "context", "data"):
        missing = frozenset(name for name in copies if _adds_up(evidence, name, dimension))
        if missing == frozenset(copies):
            own = "heads" if dimension == "tensor" and "sequence parallel" not in evidence.needed else "tokens"
            return (
                f"the gradients of {_called(missing, evidence)} are not summed over the {dimension} ranks: each holds "
                f"the part of its own {'stage' if dimension == 'pipeline' else own}, and the parts add up to the right "
                "one"
            )
    return None


def _adds_up(evidence: _Evidence, name: str, dimension: str) -> bool:
    views = dict(evidence.found.gradients[evidence.step].copies[name])
    places = evidence.found.places
    others = [{**place, dimension: None} for place in places]
    group = [view for rank, view in views.items() if others[rank] == others[min(views)]]
    reference = evidence.reference[name]
    total = np.nansum(np.stack(group), axis=0)
    held = ~np.isnan(np.stack(group)).all(axis=0)
    difference = np.linalg.norm((total - reference)[held])
    return len(group) > 1 and bool(difference <= _EXPLAINED * np.linalg.norm(reference[held]))


def _one_factor(evidence: _Evidence) -> str | None:
    """All that is wrong is wrong by the same factor."""
    if not evidence.wrong:
        return None
    ours, reference = evidence.flat(evidence.ours), evidence.flat(evidence.reference)
    factor = float(ours @ reference / max(reference @ reference, 1e-300))
    if np.linalg.norm(ours - factor * reference) > _EXPLAINED * np.linalg.norm(ours - reference):
        return None
    if abs(factor) < 1e-3:
        return None  # nothing arrived at all, which says more about micro-batches than about a scale
    everything = evidence.wrong == frozenset(evidence.reference)
    called = "every parameter" if everything else _called(evidence.wrong, evidence)
    if abs(factor) < _EXPLAINED:
        return f"the gradients of {called} are missing{_skipped_by_zero(evidence)}"
    said = f"the gradients of {called} are {factor:.4g} times what they should be"
    group = ": they are divided by the size of the wrong group" if roles(evidence.wrong) == "experts" else ""
    known = [
        f"{phrase} = {size}" if abs(factor / size - 1) < 0.01 else f"1 / {phrase} = 1 / {size}"
        for phrase, size in _sizes(evidence.case).items()
        if size > 1 and (abs(factor / size - 1) < 0.01 or abs(factor * size - 1) < 0.01)
    ]
    return f"{said}{group}{f' ({known[0]})' if known else ''}"


def _sizes(case: Case) -> dict[str, int]:
    layout, data = case.config.parallel, data_size(case)
    return {
        "expert parallel size": layout.expert,
        "data x context parallel size": data * layout.context if min(data, layout.context) > 1 else 1,
        "data parallel size": data,
        "context parallel size": layout.context,
        "tensor parallel size": layout.tensor,
        "pipeline stages": layout.pipeline,
        "micro-batches": case.config.train.global_batch_size // (case.config.train.micro_batch_size * data),
    }


def _router_losses(evidence: _Evidence) -> str | None:
    """The difference is a multiple of what the router's losses add."""
    losses = {"the load-balancing loss", "the router's z-loss"} & evidence.needed
    if not losses or not evidence.wrong:
        return None
    without = changed(evidence.case, {"model.moe.load_balance_loss": 0.0, "model.moe.z_loss": 0.0})
    plain = _total(_contributions(without))
    reference = evidence.flat(evidence.reference)
    added = reference - evidence.flat(plain)
    difference = evidence.flat(evidence.ours) - reference
    times = float(difference @ added / max(added @ added, 1e-300))
    if np.linalg.norm(difference - times * added) > _EXPLAINED * np.linalg.norm(difference):
        return f"{' and '.join(sorted(losses))} of the router differ from one rank's, and nothing else does"
    return f"the router's losses count {times + 1:.4g} times"


def _contributions(case: Case) -> dict[tuple[int, int], tuple[float, Tensors]]:
    oracle = one_rank(case)
    return run_world(lambda: contributions(oracle), 1)[0]


def _total(parts: dict[tuple[int, int], tuple[float, Tensors]]) -> Tensors:
    tensors = [gradient for _, gradient in parts.values()]
    return {name: np.sum([each[name] for each in tensors], axis=0) for name in tensors[0]}


def _micro_batches(evidence: _Evidence) -> str | None:
    """The gradient is a sum over micro-batches with the wrong factors."""
    if not evidence.wrong:
        return None
    parts = _contributions(evidence.case)
    columns = np.stack([evidence.flat(gradient) for _, gradient in parts.values()], axis=1)
    ours, reference = evidence.flat(evidence.ours), evidence.flat(evidence.reference)
    factors, *_ = np.linalg.lstsq(columns, ours, rcond=None)
    if np.linalg.norm(ours - columns @ factors) > _EXPLAINED * np.linalg.norm(ours - reference):
        return None
    weights = np.array([weight for weight, _ in parts.values()])
    per_rank = len(parts) // data_size(evidence.case)
    by_rank, ranks_weights = factors.reshape(-1, per_rank), weights.reshape(-1, per_rank).sum(axis=1)
    close = np.isclose(factors, 1, atol=_EXPLAINED)
    called = roles(evidence.wrong)
    if np.allclose(by_rank, by_rank[:, :1], rtol=_EXPLAINED) and _even(by_rank[:, 0] * ranks_weights):
        return "the loss is averaged on each data-parallel rank and then over ranks, instead of once over all tokens"
    if _even(factors * weights):
        return "the loss is averaged in each micro-batch and then over micro-batches, instead of once over all tokens"
    if (close | np.isclose(factors, 0, atol=_EXPLAINED)).all():
        which = ", ".join(str(number + 1) for number in np.flatnonzero(~close))
        return f"the gradients of {called} lack micro-batches ({which} of {len(factors)}){_skipped_by_zero(evidence)}"
    said = ", ".join(f"{factor:.3g}" for factor in factors)
    return f"micro-batches count with wrong factors ({said} instead of 1) in the gradients of {called}"


def _skipped_by_zero(evidence: _Evidence) -> str:
    """Why gradients are missing, where nothing but ZeRO takes them away."""
    return ": ZeRO did not reduce them" if any(name.startswith("ZeRO") for name in evidence.needed) else ""


def _even(numbers: np.ndarray) -> bool:
    return len(numbers) > 1 and abs(numbers[0]) > _EXPLAINED and np.allclose(numbers, numbers[0], rtol=_EXPLAINED)


_BY_NEED: tuple[tuple[frozenset[str], str], ...] = tuple(
    (frozenset(needs), cause)
    for needs, cause in (
        (
            ("dropout", "sequence parallel"),
            "the dropout masks of the tensor ranks' slices of the sequence are not those of their tokens (the same "
            "masks on every slice, or another slice's)",
        ),
        (
            ("dropout", "tensor parallel"),
            "tensor ranks drop different elements where they hold the same activations, or the same where they do not",
        ),
        (("dropout", "context parallel"), "the dropout masks of the context chunks are not those of their tokens"),
        (("dropout",), "dropout masks depend on the layout"),
        (
            ("labels behind a cut",),
            "labels are shifted after the sequence was cut, so that the last token of each slice has a wrong one",
        ),
        (
            ("context parallel", "positions"),
            "the rotary positions of the context chunks are not those of their tokens",
        ),
        (
            ("context parallel", "several documents in a row"),
            "document borders are lost or shifted where context chunks meet",
        ),
        (
            ("context parallel",),
            "chunks of keys and values are gathered in a wrong order, or not all of them",
        ),
        (("unequal weights",), "the loss is averaged over parts of the batch instead of once over all tokens"),
        (("recomputation",), "what is recomputed in the backward pass is not what the forward pass computed"),
        (("an uneven split",), "stages of an uneven split get each other's layers"),
        (("interleaved stages",), "interleaved stages run their chunks or micro-batches in a wrong order"),
        (("expert parallel",), "tokens do not reach the ranks of their experts, or come back in another order"),
        (("offloading",), "the step on the host is not that of the device"),
    )
)
"""What a failure needs, and what that means where no numbers explain it; the first row that fits."""


def _by_need(evidence: _Evidence) -> str | None:
    if not evidence.wrong and LOSS not in evidence.found.failing:
        return None
    cause = next((cause for needs, cause in _BY_NEED if needs <= evidence.needed), None)
    if cause is None and "tied embeddings" in evidence.needed and roles(evidence.wrong) == "the embedding":
        return "the tied embedding's gradients from the input and from the output are not both in its gradient"
    return cause


def _copies_drift(evidence: _Evidence) -> str | None:
    """Copies differ, and nothing else was found."""
    copies = frozenset(evidence.found.gradients[evidence.step].copies)
    if not copies:
        return None
    return f"ranks that hold copies of {roles(copies)} have different gradients of them, so that the copies drift apart"


def _update_alone(evidence: _Evidence) -> str | None:
    """Gradients and norm are right, what the optimizer made of them is not."""
    failing = evidence.found.failing
    if evidence.wrong or {LOSS, NORM, GRADIENTS} & failing:
        return None
    names = {check.worst for check in evidence.found.checks if not check.passed and check.worst}
    called = roles(frozenset(names)) if names else "the evaluation"
    return (
        f"gradients and their norm are right; {' and '.join(sorted(failing))} of {called} are not: the update differs"
    )


def _fallback(evidence: _Evidence) -> str:
    needed = [name for name in sorted(evidence.needed) if name not in ("positions", "unequal weights")]
    said = f"something that takes {', '.join(needed)}" if needed else "something that every layout has"
    wrong = f"; wrong are the gradients of {roles(evidence.wrong)}" if evidence.wrong else ""
    right = frozenset(evidence.reference) - evidence.wrong
    return f"{said}{wrong}{f', right those of {roles(right)}' if wrong and right else ''}"


RULES: tuple[Callable[[_Evidence], str | None], ...] = (
    _norm_alone,
    _left_over,
    _parts_not_summed,
    _one_factor,
    _router_losses,
    _micro_batches,
    _by_need,
    _copies_drift,
    _update_alone,
    _fallback,
)
