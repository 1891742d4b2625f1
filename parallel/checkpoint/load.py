"""Reading one checkpoint: verified first, file by file, then into whatever layout is asking.

Every file is hashed before anything is believed (the ranks share them out); a file too many, too few or damaged is
refused by its name. No file's content is run as code; see `shards` for the tensors. Every rank raises, or none.
"""

import json
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed import ProcessGroup

from parallel.checkpoint.agreement import agreed, exchange
from parallel.checkpoint.integrity import check_files
from parallel.checkpoint.manifest import STATE, TENSORS, DamagedCheckpoint, Manifest
from parallel.checkpoint.shards import read_shards
from parallel.common.errors import UserError
from parallel.common.stateful import Dispensable, Stateful


def load(
    path: Path,
    participants: Mapping[str, Stateful],
    group: ProcessGroup | None = None,
    *,
    may_differ: Callable[[str], bool] = lambda _: False,
    stands_for: Callable[[str], str] = lambda name: name,
) -> Manifest:
    """Gives each participant its state back from the step directory `path`; every rank calls this.

    A participant with tensors is asked for its `state_dict()` first: its sharded tensors say which part of which
    global tensor this rank wants, in any layout. A participant that refuses its JSON state must do so on all ranks.
    Participants of the checkpoint that are not asked for are passed over, and so are `Dispensable` ones that it lacks.
    So are tensors of which `may_differ`, told the name, says so: what the checkpoint lacks stays as it is. A tensor
    that it lacks, and has under the name that `stands_for` gives, is that one.

    Raises:
        DamagedCheckpoint: on all ranks; a file is not what was written.
        UserError: on all ranks; the checkpoint does not fit. In both cases no participant has been given anything,
            though tensors that alias live memory may have been filled.
    """
    doing = f"load the checkpoint {path}"
    with agreed(doing, group):
        manifest = Manifest.read(path)
        check_files(path, manifest, share=dist.get_rank(), shares=dist.get_world_size())
        participants = {
            name: participant
            for name, participant in participants.items()
            if name in manifest.participants or not isinstance(participant, Dispensable)
        }
        states = _json_states(path, manifest, participants)
    # Outside `agreed`: a participant may gather its state over ranks, and scatter it.
    templates = {
        name: participant.state_dict()
        for name, participant in participants.items()
        if manifest.participants[name] is not None
    }
    stored = {name for names in manifest.participants.values() for name in names or ()}
    templates = {name: _under_its_name(template, stored, stands_for) for name, template in templates.items()}
    _check_keys(path, manifest, templates, group, may_differ)
    with agreed(doing, group):
        shards = [tensor for template in templates.values() for tensor in template.values() if tensor.key in stored]
        inside = {
            name.removeprefix(f"{TENSORS}/"): record
            for name, record in manifest.files.items()
            if name.startswith(f"{TENSORS}/")
        }
        if shards:
            read_shards(path / TENSORS, shards, inside)
    for name, participant in participants.items():
        if name in templates:
            participant.load_state_dict({key: _local_data(tensor) for key, tensor in templates[name].items()})
        else:
            participant.load_state_dict(states[name])
    return manifest


def _under_its_name(
    template: Mapping[str, ShardedTensor], stored: Set[str], stands_for: Callable[[str], str]
) -> dict[str, ShardedTensor]:
    """The same shards, live memory still, of the tensors that the checkpoint has."""
    return {
        place: replace(tensor, key=stands_for(tensor.key))
        if tensor.key not in stored and stands_for(tensor.key) in stored
        else tensor
        for place, tensor in template.items()
    }


def _json_states(path: Path, manifest: Manifest, participants: Mapping[str, Stateful]) -> dict[str, Any]:
    """The states in `state.json`, after checking that the checkpoint knows every participant."""
    for name in participants:
        if name not in manifest.participants:
            known = ", ".join(manifest.participants)
            raise UserError(f"{path} holds no state of {name}: it holds {known}")
    try:
        states = json.loads((path / STATE).read_bytes())
        return {name: states[name] for name in participants if manifest.participants[name] is None}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(
            f"{path / STATE} is refused: it is not the state of the participants ({error!r})"
        ) from None


def _check_keys(
    path: Path,
    manifest: Manifest,
    templates: Mapping[str, Mapping[str, ShardedTensor]],
    group: ProcessGroup | None,
    may_differ: Callable[[str], bool],
) -> None:
    """What the checkpoint holds for a participant is what the ranks ask for, together: nothing more, nothing less."""
    mine = {name: {tensor.key for tensor in template.values()} for name, template in templates.items()}
    everywhere = exchange(mine, group)
    for name in templates:
        wanted = set().union(*(rank[name] for rank in everywhere))
        stored = set(manifest.participants[name] or ())
        for here, there, text in ((wanted, stored, "does not have"), (stored, wanted, "has")):
            surplus = sorted(key for key in here - there if not may_differ(key))
            if surplus:
                others = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
                raise UserError(
                    f"{path} does not fit the configured {name}: it {text} the tensor {surplus[0]}{others}, "
                    f"which the {name} {'needs' if here is wanted else 'lacks'}"
                )


def _local_data(tensor: ShardedTensor) -> torch.Tensor:
    """What was read into a shard, in its local shape."""
    if tensor.data is None:  # an empty shard: there was nothing to read
        tensor.init_data("cpu")
    assert tensor.data is not None
    return tensor.data
