"""`bloomery checkpoint WORD ...`: what can be done with checkpoints beside loading them. Imports without torch."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.verbs.checkpoints import check_main, diff_main, inspect_main, list_main, prune_main
from launcher.verbs.conversion import average_main, export_main, import_main
from launcher.work import Work
from parallel.common.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Word:
    arguments: str
    meaning: str
    main: Callable[[Sequence[str]], int | Work]


WORDS = {
    "list": _Word(arguments="RUN", meaning="the checkpoints of a run, and why each stays", main=list_main),
    "inspect": _Word(
        arguments="CHECKPOINT",
        meaning="layout, step, tokens, size, names, shapes and norms of tensors",
        main=inspect_main,
    ),
    "check": _Word(arguments="CHECKPOINT", meaning="compare every file with its hash", main=check_main),
    "diff": _Word(arguments="A B", meaning="what differs between two, tensor by tensor", main=diff_main),
    "prune": _Word(arguments="RUN", meaning="remove the checkpoints that no rule keeps", main=prune_main),
    "average": _Word(
        arguments="A B ... --output DIR", meaning="make the mean of several's weights a checkpoint", main=average_main
    ),
    "export": _Word(
        arguments="CHECKPOINT --output DIR",
        meaning="write weights, description and tokenizer for Hugging Face's libraries",
        main=export_main,
    ),
    "import": _Word(
        arguments="PATH --output DIR",
        meaning="make a model of Hugging Face's, DeepSpeed's or Megatron-LM's step 0 of a run, to go on from it",
        main=import_main,
    ),
}


def main(arguments: Sequence[str]) -> int | Work:
    """Runs one word; `--help` lists them."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    word = WORDS.get(arguments[0])
    if word is None:
        near = difflib.get_close_matches(arguments[0], WORDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(WORDS)}."
        raise UserError(f"{arguments[0]} is not a word of bloomery checkpoint: {hint}")
    return word.main(arguments[1:])


def _help() -> str:
    width = max(len(f"{name} {word.arguments}") for name, word in WORDS.items())
    lines = [f"  {f'{name} {word.arguments}':<{width}}   {word.meaning}" for name, word in WORDS.items()]
    return "\n".join(["bloomery checkpoint WORD ...", "", *lines, "", "`bloomery checkpoint WORD --help` says more."])
