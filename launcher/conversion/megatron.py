"""Checkpoints of Megatron-LM: its own description of the model, and the tensors that belong to it."""

from pathlib import Path

from omegaconf import OmegaConf

from launcher.conversion.sources import Foreign
from model import megatron
from model.config import ModelConfig
from parallel.checkpoint.torch_dist import TorchDistFiles
from parallel.common.errors import UserError


def open_megatron(path: Path, *, moments: bool) -> Foreign:
    """A `torch_dist` checkpoint of a GPT.

    Args:
        path: the directory that `--save` named, or one of its iterations.
        moments: whether the optimizer's are wanted, where there is an optimizer.

    Raises:
        UserError: something is missing, damaged or not understood; it names it.
    """
    source = TorchDistFiles(path)
    if moments and source.unread_moments:
        raise UserError(
            f"{source.place} has moments that depend on the layout that saved them ({source.unread_moments[0]}): save "
            "with --dist-ckpt-optim-fully-reshardable, or import with --parts weights."
        )
    values = megatron.model_values(source.arguments)
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    assert isinstance(model, ModelConfig)
    names = source.names
    pairs = list(megatron.pairs(model, names))
    wanted = {part for pair in pairs for part in pair.theirs}
    for name in sorted(wanted ^ names):
        told = "has no tensor" if name in wanted else "has a tensor that is not understood:"
        raise UserError(f"{source.place} {told} {name}, by what its arguments say of the model.")
    return Foreign(source=source, model=model, pairs=pairs)
