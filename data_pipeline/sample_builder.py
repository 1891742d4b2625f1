"""What makes samples, and the plainest of them: one builder for each way to learn from the same store (`forms`).

A builder says what it reads (a stream of `samples.Samples`, each row some tokens of a source and the one that follows
them) and makes rows into a batch. Everything random in it depends on (seed, purpose, sample) alone, so that neither
data-parallel size nor resuming changes a sample.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from data_pipeline.batch import Rows, make_batch
from data_pipeline.corruption import MaskingConfig, SpansConfig
from data_pipeline.samples import Samples
from data_pipeline.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a builder is made from."""

    store: Store
    sequence_length: int
    """Tokens in a row of a batch."""
    seed: int
    """Keys what is drawn."""
    mask_documents: bool
    """Whether positions and document ids tell the documents of a sample apart."""
    masking: MaskingConfig
    spans: SpansConfig


class SampleBuilder(ABC):
    """Rows of the store as a batch."""

    length: int
    """Tokens that a sample takes from the stream of its source."""

    def stream(self, store: Store, source: str, *, split: str, seed: int | None) -> Samples | None:
        """The samples of a source, where the form needs its own; None: documents one after the other, or packed."""
        return None

    @abstractmethod
    def batch(self, rows: Rows) -> dict[str, Tensor]:
        """A batch as in `data_pipeline.batch`, with what the objective has besides; a row has `length` + 1 tokens."""


class Causal(SampleBuilder):
    """Each token's label is the next one."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.length = setting.sequence_length

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        store = self._setting.store
        return make_batch(
            rows,
            end_of_document=store.end_of_document,
            padding=store.padding,
            mask_documents=self._setting.mask_documents,
        )
