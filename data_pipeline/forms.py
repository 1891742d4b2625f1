"""The forms that samples have, by name: one table."""

from collections.abc import Callable, Mapping

from data_pipeline.builders import Causal, SampleBuilder, Setting
from data_pipeline.masking import Masked
from data_pipeline.pairs import Pairs

CAUSAL = "causal"
BUILDERS: Mapping[str, Callable[[Setting], SampleBuilder]] = {CAUSAL: Causal, "masked": Masked, "pairs": Pairs}
