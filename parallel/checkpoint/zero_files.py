"""Checkpoints that DeepSpeed's ZeRO wrote, read tensor by tensor: stages 1 to 3, any number of data-parallel ranks,
and tensor parallelism where DeepSpeed cut the model itself (AutoTP).

    PATH/latest                                              names the newest step
    PATH/global_step100/mp_rank_00_model_states.pt           names and shapes (stage 3: one a data-parallel rank)
                        [bf16_]zero_pp_rank_1_mp_rank_00_optim_states.pt   flat float32 masters and moments

Stages 1 and 2: a group's parameters stand one after the other in one flat vector, which the ranks share out in order.
Stage 3: each rank's flat vector has its share of every parameter, one after the other, filled up to equal length. Under
AutoTP `universal_checkpoint_info` says which rectangle of which rank belongs where.

Nothing is run: `torch.load` in its weights-only mode, where DeepSpeed's three classes stand for inert records. Files
are mapped, not read: memory is one tensor at a time.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint.inert import InertRecord, load_inert
from parallel.common.errors import UserError
from parallel.updater import MOMENTS, Kind

_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_STAGES = (1, 2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a parameter stands in the flat vectors of one tensor-parallel rank."""

    group: int
    start: int
    """Elements before it in the group's whole vector; at stage 3 in the rank's own."""
    shape: tuple[int, ...]


class _TensorRank:
    """What one tensor-parallel rank has: its names, and its data-parallel ranks' flat vectors."""

    def __init__(self, model: Path, optimizers: Sequence[Path]) -> None:
        self.path = model
        self.description = load_inert(model, _CLASSES)
        states = []
        for path in optimizers:
            state = load_inert(path, _CLASSES).get("optimizer_state_dict")
            if not isinstance(state, dict) or "zero_stage" not in state or "partition_count" not in state:
                raise UserError(f"{path} is not ZeRO's: it has no zero_stage.")
            states.append(state)
        self._states = states
        stage = states[0]["zero_stage"]
        self.stage = stage.values[0] if isinstance(stage, InertRecord) else int(stage)
        if self.stage not in _STAGES:
            raise UserError(f"{optimizers[0]} is of ZeRO stage {self.stage}: those that are read are 1, 2 and 3.")
        counts = states[0]["partition_count"]
        ranks = max(counts) if isinstance(counts, list) else counts
        if ranks != len(states):
            raise UserError(
                f"{model.parent} has {len(states)} files *_optim_states.pt of {model.name}, where {ranks} ranks wrote."
            )

    @cached_property
    def places(self) -> dict[str, _Place]:
        """By name of the parameter."""
        shapes = self.description.get("param_shapes")
        if not isinstance(shapes, list) or not all(isinstance(group, dict) for group in shapes):
            raise UserError(f"{self.path} has no param_shapes: it is not ZeRO's.")
        frozen = sorted(self.description.get("frozen_param_shapes") or {})
        if frozen:
            raise UserError(f"{self.path} has parameters that were not trained ({frozen[0]}), which are not converted.")
        found: dict[str, _Place] = {}
        for group, members in enumerate(shapes):
            start = 0
            paddings = self._paddings(group, len(members))
            for (name, shape), padding in zip(members.items(), paddings, strict=True):
                found[name] = _Place(group=group, start=start, shape=tuple(shape))
                start += math.ceil(math.prod(shape) / len(self._states)) if self.stage == 3 else math.prod(shape)
                start += padding
            self._check_length(group, start)
        return found

    def _paddings(self, group: int, members: int) -> list[int]:
        """Elements after each parameter of a group that belong to none."""
        paddings = self._states[0].get("param_alignment_paddings")
        return [0] * members if paddings is None else list(paddings[group])

    def _check_length(self, group: int, wanted: int) -> None:
        for kind in self.kinds:
            lengths = [vector.numel() for vector in self._vectors(group, kind)]
            if (min(lengths) if self.stage == 3 else sum(lengths)) < wanted:
                raise UserError(f"{self.path.parent}: the {kind} of group {group} are shorter than its parameters.")

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The weight, and the moments where every group has them."""
        groups = range(len(self._states[0][self._masters]))
        there = all(
            moment in self._moments(state).get(group, {})
            for state in self._states
            for group in groups
            for moment in MOMENTS
        )
        return tuple(Kind) if there else (Kind.weight,)

    @property
    def steps(self) -> int | None:
        """Steps that the moments stand for."""
        state = self._states[0]
        known = self._moments(state).get(0, {}).get("step", self._param_groups(state)[0].get("step"))
        return None if known is None else int(known)

    @property
    def _masters(self) -> str:
        return "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"

    def _moments(self, state: Mapping[str, Any]) -> dict[int, Any]:
        """By group, the optimizer's state."""
        return self._base(state).get("state", {})

    def _param_groups(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self._base(state).get("param_groups") or [{}]

    def _base(self, state: Mapping[str, Any]) -> dict[str, Any]:
        base = state.get("optimizer_state_dict" if self.stage == 3 else "base_optimizer_state")
        if not isinstance(base, dict):
            raise UserError(
                f"{self.path.parent} has moments of an elastic checkpoint (base_optimizer_state is a "
                f"{type(base).__name__}): save with elastic_checkpoint off, or import with --parts weights."
            )
        return base

    def _vectors(self, group: int, kind: Kind) -> list[Tensor]:
        """Every data-parallel rank's flat vector."""
        if kind is Kind.weight:
            return [state[self._masters][group] for state in self._states]
        return [self._moments(state)[group][kind.value] for state in self._states]

    def read(self, name: str, kind: Kind) -> Tensor:
        """One parameter as this tensor-parallel rank has it, float32."""
        place = self.places[name]
        count = math.prod(place.shape)
        vectors = self._vectors(place.group, kind)
        if self.stage == 3:
            share = math.ceil(count / len(vectors))
            whole = torch.cat([vector[place.start : place.start + share] for vector in vectors])[:count]
        else:
            whole = torch.cat([*_pieces(vectors, place.start, place.start + count)])
        return whole.float().view(place.shape)


def _pieces(vectors: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """The elements from `start` to `stop` of vectors that follow each other."""
    found, before = [], 0
    for vector in vectors:
        length = vector.numel()
        if start < before + length and stop > before:
            found.append(vector[max(0, start - before) : stop - before])
        before += length
    return found


class ZeroFiles:
    """The trained parameters of a DeepSpeed checkpoint, whole, by the names that the model gave them."""

    def __init__(self, path: Path) -> None:
        """Reads descriptions; no tensor yet.

        Args:
            path: the directory with `latest`, or one of its steps.

        Raises:
            UserError: it is no checkpoint of ZeRO's, a file is damaged or missing, or something is not understood.
        """
        self.place = _step_directory(path)
        self._ranks = _tensor_ranks(self.place)
        first = self._ranks[0]
        self.kinds, self.steps, self.stage = first.kinds, first.steps, first.stage
        self._cuts = _cuts(first) if len(self._ranks) > 1 else {}
        self._names = set(first.places)

    @property
    def names(self) -> set[str]:
        """Of the parameters; of those that share a memory, one."""
        return self._names

    def shape(self, name: str) -> list[int]:
        """Of the whole parameter."""
        if self._cuts:
            return list(self._cut(name)["logical_shape"])
        return list(self._ranks[0].places[name].shape)

    def read(self, name: str, kind: Kind = Kind.weight) -> Tensor:
        """The whole parameter, or one of its moments; float32."""
        if not self._cuts:
            return self._ranks[0].read(name, kind)
        cut = self._cut(name)
        whole = torch.full(tuple(cut["logical_shape"]), torch.nan)
        for number, rank in enumerate(self._ranks):
            part = rank.read(name, kind)
            try:
                for piece in cut["ranks"][number]["pieces"]:
                    (first, strides), (part_first, part_strides) = piece["source"], piece["dest"]
                    target = whole.as_strided(piece["shape"], strides, first)
                    target.copy_(part.as_strided(piece["shape"], part_strides, part_first))
            except RuntimeError as error:
                raise UserError(f"{rank.path}: the affine_map of {name} does not fit ({error}).") from None
        if whole.isnan().any():
            raise UserError(
                f"{self.place}: the tensor-parallel ranks do not have all of {name}, or it is not a number."
            )
        return whole

    def _cut(self, name: str) -> dict[str, Any]:
        """How a parameter is cut over the tensor-parallel ranks."""
        found = [cut for pattern, cut in self._cuts.items() if pattern.fullmatch(name)]
        if len(found) != 1:
            raise UserError(f"{self.place} does not say how {name} is cut over tensor-parallel ranks.")
        return found[0]


def _step_directory(path: Path) -> Path:
    latest = path / "latest"
    if latest.is_file():
        step = latest.read_text().strip()
        if not re.fullmatch(r"[\w.-]+", step) or step.startswith("."):
            raise UserError(f"{latest} says {step!r}: expected the name of a directory beside it.")
        path = path / step
    if not any(_MODEL.fullmatch(file.name) for file in path.glob("*_model_states.pt")):
        raise UserError(
            f"{path} is not a DeepSpeed checkpoint: expected a directory with `latest`, or with *_model_states.pt."
        )
    return path


def _tensor_ranks(directory: Path) -> list[_TensorRank]:
    models: dict[int, Path] = {}
    optimizers: dict[int, dict[int, Path]] = {}
    for file in sorted(directory.iterdir()):
        if found := _MODEL.fullmatch(file.name):
            if found[1] in (None, "0"):
                models[int(found[2])] = file
        elif found := _OPTIMIZER.fullmatch(file.name):
            optimizers.setdefault(int(found[2]), {})[int(found[1])] = file
        elif file.suffix == ".pt":
            raise UserError(f"{file} is not understood: a model with pipeline stages or experts of DeepSpeed's own?")
    ranks = []
    for number in range(len(models)):
        files = optimizers.get(number, {})
        if number not in models or sorted(files) != list(range(len(files))) or not files:
            raise UserError(f"{directory} lacks a file of tensor-parallel rank {number}, *_mp_rank_{number:02d}_*.pt.")
        ranks.append(_TensorRank(models[number], [files[rank] for rank in range(len(files))]))
    return ranks


def _cuts(rank: _TensorRank) -> dict[re.Pattern[str], dict[str, Any]]:
    """AutoTP's description of who has what, by pattern of names."""
    information = rank.description.get("universal_checkpoint_info") or {}
    described = information.get("affine_map") or {}
    if described.get("version") != 1:
        raise UserError(
            f"{rank.path} does not say how tensors are cut over tensor-parallel ranks (affine_map, version 1, which "
            "DeepSpeed's AutoTP writes since 0.19): convert it to one tensor-parallel rank first."
        )
    return {re.compile(pattern): cut for pattern, cut in described["params"].items()}
