"""What a run minimises, over which samples: the objective by its name, and the form of sample that goes with it."""

from collections.abc import Sequence
from dataclasses import replace

from data_pipeline.plan import Plan
from launcher.config import RunConfig
from launcher.length import ramp
from model import families, objectives
from model.config import ObjectiveName
from parallel.engine import Objective


def objective_of(config: RunConfig, *, sources: Sequence[str] = ()) -> Objective:
    """What the run minimises; it reports the loss of each of the store's `sources` too, if they are given."""
    name = families.objective(config.model, config.train.objective)
    return objectives.objective(name, z_loss=config.train.z_loss, sources=sources)


def travelling_length(config: RunConfig) -> int:
    """Tokens of a row that pass from stage to stage of a pipeline: a decoder's beside its encoder's."""
    length = config.train.sequence_length
    if config.model.decoder_layers is None:
        return length
    whole = families.objective(config.model, config.train.objective) == ObjectiveName.seq2seq
    return length + (length if whole else config.data.spans.target_length(length))


def plan_of(config: RunConfig) -> Plan:
    """What the run asks of its loader, the form of its samples among it."""
    plan = Plan.of(config.data, families.form(config.model, config.train.objective))
    return replace(plan, ramp=ramp(config))
