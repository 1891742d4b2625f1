"""Conversations to text by a chat template, and where in the text the assistant speaks.

Templates are rendered by `transformers` (extra `hf`), sandboxed as it does it. What the assistant says is what the
template puts between the prompt of an answer and the next turn: the conversation up to a message is rendered with and
without it, and the one has to begin the other. A template for which that is not so (it leaves out what was thought in
earlier turns) may mark answers itself, by `{% generation %}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

_transformers = Lazy("transformers")
_templates = Lazy("transformers.utils.chat_template_utils")

Messages = Sequence[Mapping[str, Any]]


def render(template: str, messages: Messages, special: Mapping[str, str], *, prompt: bool = False) -> str:
    """The text of a conversation.

    Args:
        template: jinja.
        messages: each with `role` and `content`.
        special: names of tokens that templates ask for, such as `bos_token`.
        prompt: whether the beginning of an answer follows.

    Raises:
        UserError: the template refuses the conversation, or `transformers` is not installed.
    """
    return _rendered(template, messages, add_generation_prompt=prompt, **special)[0][0]


def spans(template: str, messages: Messages, special: Mapping[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and from where to where in it the assistant speaks, in characters.

    Raises:
        UserError: as `render`; or the template does not say where.
    """
    if "{% generation %}" in template or "{%- generation" in template:
        texts, found = _rendered(template, messages, return_assistant_tokens_mask=True, **special)
        return texts[0], [(int(first), int(end)) for first, end in found[0]]
    whole = render(template, messages, special)
    places = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(template, messages[:number], special, prompt=True)
            until = render(template, messages[: number + 1], special)
            if not whole.startswith(until) or not until.startswith(before):
                raise UserError(
                    "the chat template writes a turn in another way when others follow, so that it cannot be seen "
                    "what the assistant says: mark it in the template by {% generation %} and {% endgeneration %}"
                )
            places.append((len(before), len(until)))
    return whole, places


def _rendered(template: str, messages: Messages, **options: Any) -> tuple[list[str], list[Any]]:
    if not _transformers.is_installed:
        raise UserError("chat templates need transformers: pip install 'bloomery[hf]'")
    plain = [dict(message) for message in messages]
    try:
        return _templates.render_jinja_template(conversations=[plain], chat_template=template, **options)
    except UserError:
        raise
    except Exception as error:  # jinja's, and what a template raises by itself
        raise UserError(f"the chat template refuses a conversation: {str(error) or type(error).__name__}") from error
