"""A text on the terminal while it is written."""

from collections.abc import Callable, Collection, Sequence

from torch import Tensor


class Streamer:
    """Told tokens by `generate`, it says text: whole letters, and nothing that may turn out to be a stop."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], say: Callable[[str], None], *,
        ends: Collection[int], stop: Sequence[str], prompt: bool = True,
    ) -> None:  # fmt: skip
        """`prompt`: the first that it is told is the prompt, which is not said."""
        self._decode = decode
        self._say = say
        self._ends = set(ends)
        self._stop = tuple(stop)
        self._prompt = prompt
        self._ids: list[int] = []
        self._said = 0

    def put(self, value: Tensor) -> None:
        """Some tokens, [tokens] or [1, tokens]."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._ends]
        held = max((len(each) for each in self._stop), default=1) - 1
        text = self._decode(self._ids)
        self._up_to(text, len(text.rstrip("\ufffd")) - held)

    def end(self) -> None:
        """Nothing follows."""
        text = self._decode(self._ids)
        self._up_to(text, len(text))

    def _up_to(self, text: str, place: int) -> None:
        found = (text.find(each) for each in self._stop)
        place = min((place, *(stop for stop in found if stop >= 0)))
        if place > self._said:
            self._say(text[self._said : place])
            self._said = place
