"""The validation documents as batches, and the loss on the first of them inside the training loop."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from data_pipeline.loader import single_pass
from data_pipeline.store import VALIDATION, Store
from launcher.config import RunConfig
from launcher.meter import means
from launcher.metrics import nested
from launcher.objective import plan_of
from launcher.progress import Every
from parallel.engine import Engine
from parallel.topology import Topology


def validation_batches(config: RunConfig, *, store: Store, topology: Topology) -> Iterator[dict[str, Tensor]]:
    """This data-parallel slice of every validation document, in the same order each time."""
    return single_pass(
        store,
        VALIDATION,
        sequence_length=config.train.sequence_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=topology.data_parallel_rank,
        dp_size=topology.data_parallel_size,
        mask_documents=config.data.mask_documents,
        plan=plan_of(config),
    )


class Validation:
    """Looks at a fixed sample of the validation documents when it is due."""

    def __init__(self, config: RunConfig, *, store: Store, topology: Topology, total_steps: int) -> None:
        """Reads nothing unless `evaluate.every_steps` asks for it."""
        every = config.evaluate.every_steps
        self.schedule = Every(every, besides=() if every is None else (total_steps,))
        self._batches: Sequence[dict[str, Tensor]] = ()
        if every is not None:
            batches = validation_batches(config, store=store, topology=topology)
            self._batches = list(islice(batches, config.evaluate.batches))

    def due(self, step: int) -> bool:
        """Whether to look after this step."""
        return self.schedule.due(step)

    def take(self, engine: Engine, step: int) -> dict[str, Any]:
        """`{"validation_loss": mean nats a token}` after this step, and what the objective reports. All ranks call
        this together."""
        del step
        total = weight = 0.0
        reported: dict[str, Tensor] = {}
        for batch in self._batches:
            result = engine.evaluate(batch)
            total += result.loss.item() * result.weight.item()
            weight += result.weight.item()
            for name, pair in result.reported.items():
                reported[name] = reported[name] + pair if name in reported else pair
        found = {f"validation_{name}": value for name, value in means(reported).items()}
        return {"validation_loss": total / weight, **nested(found)}
