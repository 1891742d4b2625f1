"""What must survive a restart says so by having these two methods."""

from typing import Any, Protocol


class Stateful(Protocol):
    """Something whose state a checkpoint keeps.

    The state is either plain JSON (numbers, strings, lists, dicts) or a dict of megatron-core `ShardedTensor`s; never
    an arbitrary object, because loading a checkpoint must not run code.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Dispensable:
    """Marks a Stateful that came later than the format: where a checkpoint holds no state of it, it keeps its own."""
