"""Everything that is explained of a layout, as plain data: for the screen and for `--json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.explain.collectives import Collective
from launcher.explain.rows import Row
from parallel.config import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the rank of a small copy that holds most is computed to hold, and holds."""

    precision: Precision
    computed: Mapping[str, int]
    measured: Mapping[str, int]

    @property
    def computed_bytes(self) -> int:
        return sum(self.computed.values())

    @property
    def measured_bytes(self) -> int:
        return sum(self.measured.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """A configuration on some ranks."""

    layout: str
    """In words."""
    ranks: int
    precision: Precision
    parameters: int
    rank_parameters: int
    """Of the pipeline stage that holds most."""
    rows: Sequence[Row]
    measured: Mapping[int, Sequence[Measured]] = field(default_factory=dict)
    """By the number of a row: small copies with that pipeline and stage, two data-parallel ranks and no other cut."""
    small: str = ""
    """The user's own row made small, in words."""
    own_measured: Measured | None = None
    collectives: Sequence[Collective] | None = None
    """Of the user's own row made small; None where nothing was measured."""

    @property
    def own(self) -> Row:
        return next(row for row in self.rows if row.yours)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "layout": self.layout,
            "ranks": self.ranks,
            "precision": self.precision.value,
            "parameters": self.parameters,
            "parameters_of_a_rank": self.rank_parameters,
            "rows": [_row(row, self.measured.get(number)) for number, row in enumerate(self.rows)],
            "own": None if self.own_measured is None else {"small": self.small, **_measured(self.own_measured)},
            "collectives": None if self.collectives is None else [asdict(call) for call in self.collectives],
        }


def _row(row: Row, measured: Sequence[Measured] | None) -> dict[str, Any]:
    how = row.mechanism
    return {
        "pipeline": row.layout.pipeline,
        "virtual_pipeline": row.layout.virtual_pipeline,
        "zero_stage": row.layout.zero_stage,
        "yours": row.yours,
        "refused": row.refused,
        "runs": how and how.runs,
        "sharded": how and list(how.sharded),
        "gradients_reduced": how and how.reduction.value,
        "reason": how and how.reason,
        "bytes": {precision.value: dict(held) for precision, held in row.bytes.items()},
        "measured": [_measured(one) for one in measured or ()],
    }


def _measured(one: Measured) -> dict[str, Any]:
    return {"precision": one.precision.value, "computed": dict(one.computed), "measured": dict(one.measured)}
