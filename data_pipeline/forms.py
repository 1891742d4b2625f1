"""The forms that samples have, by name: one table."""

from collections.abc import Callable

from data_pipeline.examples.rows import Answers, Classes, EncoderClasses, Targets
from data_pipeline.masking import Masked
from data_pipeline.pairs import Pairs
from data_pipeline.prefix import Prefix
from data_pipeline.sample_builder import Causal, SampleBuilder, Setting
from data_pipeline.spans import Spans

CAUSAL = "causal"
BUILDERS: dict[str, Callable[[Setting], SampleBuilder]] = {
    CAUSAL: Causal,
    "prefix": Prefix,
    "masked": Masked,
    "pairs": Pairs,
    "spans": Spans,
    "answers": Answers,
    "targets": Targets,
    "classes": Classes,
    "encoder_classes": EncoderClasses,
}


def register_form(name: str, builder: Callable[[Setting], SampleBuilder]) -> None:
    """Makes a form of samples of your own known, for an objective that reads it.

    Raises:
        ValueError: the name is taken.
    """
    if name in BUILDERS:
        raise ValueError(f"there is a form of samples called {name} already")
    BUILDERS[name] = builder
