"""The command line: one verb, one module.

A verb's module is imported only when it is called, so that `bloomery --help` answers at once. Its contract is
`main(arguments) -> int | Work`: parse, check, answer what needs no computing, all without torch. Where computing is
needed it returns `Work`, which names the module that imports torch and does it (`work(job) -> int`); a second call of
a stage that is finished never gets there.

Exit codes: 0 the goal was reached; 2 the user's mistake, told in one sentence; 75 saved and to be requeued; 130
interrupted; 1 anything else, with its stack trace.
"""

import difflib
import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.logs import quiet_imports
from launcher.work import Work, as_mistake, is_first_rank
from parallel.common.errors import ConfigError, UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """A word after `bloomery`."""

    module: str
    arguments: str
    meaning: str


VERBS = {
    "quickstart": Verb(
        module="launcher.quickstart", arguments="[--data FILE]", meaning="raw text to a trained model on this machine"
    ),
    "data": Verb(
        module="launcher.data",
        arguments="WORD ...",
        meaning="clean, deduplicate and tokenise text into a token store; look into it",
    ),
    "train": Verb(
        module="launcher.verbs.train", arguments="CONFIG... [key=value ...]", meaning="train, or go on where it stopped"
    ),
    "submit": Verb(
        module="launcher.verbs.submit",
        arguments="CONFIG... --nodes N [key=value ...]",
        meaning="train as a Slurm job that survives its cluster",
    ),
    "status": Verb(
        module="launcher.verbs.status",
        arguments="[RUN]",
        meaning="where runs are: job, attempts, steps lost, speed, time to go, last error",
    ),
    "verify": Verb(
        module="launcher.verbs.verify",
        arguments="CONFIG... [key=value ...]",
        meaning="prove the layout equal to one rank, small, on the CPU",
    ),
    "checkpoint": Verb(
        module="launcher.verbs.checkpoint",
        arguments="WORD ...",
        meaning="list, inspect, check, diff, prune; export, import",
    ),
    "plan": Verb(
        module="launcher.verbs.plan",
        arguments="CONFIG... --nodes N --hardware NAME",
        meaning="the best layouts on a machine: memory, time, cost, and why not others",
    ),
    "explain": Verb(
        module="launcher.verbs.explain",
        arguments="CONFIG... [key=value ...]",
        meaning="what a layout runs, shards and sends, and the bytes a rank holds",
    ),
    "evaluate": Verb(
        module="launcher.verbs.evaluate",
        arguments="CHECKPOINT [--task FILE]",
        meaning="bits per byte on the validation documents; figures of tasks",
    ),
    "generate": Verb(
        module="launcher.verbs.generate",
        arguments="CHECKPOINT --prompt TEXT",
        meaning="continue a text, answer, fill gaps",
    ),
    "doctor": Verb(
        module="launcher.verbs.doctor", arguments="[--job]", meaning="what this machine can do, and what to mend"
    ),
    "report": Verb(
        module="launcher.verbs.report",
        arguments="RUN...",
        meaning="one HTML file with everything about a run, or several compared",
    ),
}

_EXAMPLE = """\
An example, from raw text to a sample of what was learnt:

  bloomery data build configs/quickstart.yaml
  bloomery train      configs/quickstart.yaml run.name=first --ranks 2
  bloomery evaluate   first
  bloomery generate   first --prompt "def read(path):"
  bloomery report     first

CONFIG is one or more YAML files, merged left to right; key=value overrides them (train.steps=100).
CHECKPOINT is a step directory, a run (its newest whole step) or RUN@STEP; RUN is a directory or a name under runs/.
`bloomery VERB --help` says more. Exit codes: 0 done, 2 your input needs a change, 75 saved and to be requeued."""


def help_text() -> str:
    """What `bloomery --help` prints."""
    width = max(len(f"{name} {verb.arguments}") for name, verb in VERBS.items())
    lines = [f"  {f'{name} {verb.arguments}':<{width}}   {verb.meaning}" for name, verb in VERBS.items()]
    return "\n".join(["Bloomery: raw text in, trained language models out.", "", *lines, "", _EXAMPLE])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _dispatch(given))


def guarded(work: Callable[[], int]) -> int:
    """Does something for a user, whose mistakes are told in one sentence; returns the exit code."""
    try:
        return work()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        mistake = as_mistake(error)
        if mistake is None:
            raise
        if is_first_rank():
            print(_told(mistake), file=sys.stderr)
        return 2


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if given else 2
    verb = VERBS.get(given[0])
    if verb is None:
        near = difflib.get_close_matches(given[0], VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VERBS)}."
        raise UserError(f"{given[0]} is not a verb of bloomery: {hint}")
    answer: Any = _imported(verb.module).main(given[1:])
    if isinstance(answer, Work):
        with quiet_imports(answer.rank, answer.logs):
            module = _imported(answer.module)
        return module.work(answer.job)
    return answer


def _imported(name: str) -> Any:
    """A module and all that it needs, which is not searched for garbage: a tenth of the start, and 0.3 s a search."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _told(error: UserError) -> str:
    """The sentence that a user reads; several problems of one configuration stand below each other."""
    if isinstance(error, ConfigError):
        return "\n".join(["The configuration needs a change:", *(f"  {problem}" for problem in error.problems)])
    return f"bloomery: {error}"
