"""What an example store holds beside tokens: `examples.json`, and the marks that stand in its documents.

A document of an example store is what a model reads, with what it is to learn between two marks, then its end:

    chat, or a prompt     <turn> user ... <turn> assistant  BEGIN  the answer  END   <turn> user ...
    a class of a text     the text                          BEGIN  class       END
    classes of its words  the words                         BEGIN  class of each token, or padding where none  END

So one form serves every way of fine-tuning, shards stay plain ids that other tools read, and whoever makes samples
takes the marks out again (`rows`). A class is written as the n-th ordinary id of the vocabulary, so that it is never
an end of document or a mark.
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from data_pipeline.store import Store
from data_pipeline.tokenizer import RESERVED
from parallel.common.errors import UserError
from parallel.common.files import write_json

FILE = "examples.json"
BEGIN, END, BORDER = RESERVED[6], RESERVED[7], RESERVED[10]
"""Around what is to be learnt; the last stands between the examples of a row, and in no store."""
TURN, TURN_END = RESERVED[8], RESERVED[9]
"""Around a turn of a conversation, in the chat template that a model of ours has by default."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{TURN}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{TURN_END}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{TURN}assistant\n{{% endif %}}"
)


class Kind(StrEnum):
    """What is learnt from an example, and the fields of its record."""

    answers = "answers"
    """`messages` of a conversation: what the assistant says; or `prompt` and `completion`."""
    text_classes = "text_classes"
    """`text` and `label`."""
    token_classes = "token_classes"
    """`words` and `labels`, one each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The content of `examples.json`."""

    kind: Kind
    labels: tuple[str, ...] = ()
    """Names of the classes, by number."""
    chat_template: str | None = None
    """Where the examples are conversations."""

    def write(self, store: Path) -> None:
        """Puts it into a store's directory."""
        write_json(store / FILE, asdict(self))

    @classmethod
    def read(cls, store: Path) -> "Facts | None":
        """That of a store; None where it is one of plain text.

        Raises:
            UserError: it is damaged.
        """
        file = store / FILE
        if not file.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
            return cls(kind=Kind(found["kind"]), labels=tuple(found["labels"]), chat_template=found["chat_template"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is damaged: make the store again with `bloomery data examples`") from None


def facts_of(store: Store, *kinds: Kind) -> Facts:
    """The facts of a store of examples of one of some kinds.

    Raises:
        UserError: it is not one.
    """
    found = Facts.read(store.path)
    if found is None or found.kind not in kinds:
        what = "plain text" if found is None else f"examples of {found.kind.value}"
        raise UserError(
            f"data.store {store.path} holds {what}: this objective learns from {' or '.join(kinds)}, which "
            "`bloomery data examples` makes"
        )
    return found
