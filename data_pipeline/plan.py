"""What the configuration asks of a loader beyond the mixture: later phases, packing, transforms, following."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipeline.config import DataConfig, FillInTheMiddleConfig, Packing, PhaseConfig
from data_pipeline.corruption import MaskingConfig, SpansConfig
from data_pipeline.following import Following
from data_pipeline.forms import BUILDERS, CAUSAL
from data_pipeline.middle import FillInTheMiddle
from data_pipeline.packing import PackedStream
from data_pipeline.sample_builder import SampleBuilder, Setting
from data_pipeline.samples import Samples, SourceStream
from data_pipeline.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The plain loader, unless something else is said."""

    form: str = CAUSAL
    """Of the samples: a name in `forms`."""
    ramp: Sequence[tuple[int, int]] = ()
    """Sizes of the first global batches: pairs of a size and how many steps have it."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    spans: SpansConfig = field(default_factory=SpansConfig)
    schedule: Sequence[PhaseConfig] = ()
    """Other mixtures and lengths from later steps on."""
    packing: Packing = Packing.concatenate
    max_documents_per_sequence: int | None = None
    """With best fit."""
    fill_in_the_middle: FillInTheMiddleConfig | None = None
    following: Following | None = None
    """Wait where a store that still grows is behind."""

    @classmethod
    def of(cls, config: DataConfig, form: str = CAUSAL) -> "Plan":
        """What a configuration says, for samples of a form."""
        return cls(
            form=form,
            masking=config.masking,
            spans=config.spans,
            schedule=tuple(config.schedule),
            packing=config.packing,
            max_documents_per_sequence=config.max_documents_per_sequence,
            fill_in_the_middle=config.fill_in_the_middle,
            following=Following(limit_seconds=config.follow_seconds) if config.follow else None,
        )

    def builder(self, store: Store, *, sequence_length: int, seed: int, mask_documents: bool) -> SampleBuilder:
        """What makes batches."""
        setting = Setting(
            store=store,
            sequence_length=sequence_length,
            seed=seed,
            mask_documents=mask_documents,
            masking=self.masking,
            spans=self.spans,
        )
        return BUILDERS[self.form](setting)

    def samples(self, builder: SampleBuilder, store: Store, source: str, *, split: str, seed: int) -> Samples:
        """The stream of a source for a builder."""
        own, sequence_length = builder.stream(store, source, split=split, seed=seed), builder.length
        if own is not None:
            return own
        if self.packing is Packing.concatenate:
            return SourceStream(store, source, split=split, sequence_length=sequence_length, seed=seed)
        most = self.max_documents_per_sequence
        return PackedStream(store, source, split=split, sequence_length=sequence_length, seed=seed, most=most)

    def transform(self, store: Store, *, seed: int) -> FillInTheMiddle | None:
        """What turns documents, if anything does."""
        settings = self.fill_in_the_middle
        return None if settings is None or not settings.rate else FillInTheMiddle(store, settings, seed=seed)

    def options(self) -> dict[str, Any]:
        """What decides the samples of a position, for the loader's fingerprint; only what is not as it always was."""
        found: dict[str, Any] = {"packing": self.packing.value}
        if self.form != CAUSAL:
            found |= {"form": self.form, "masking": asdict(self.masking), "spans": asdict(self.spans)}
        if self.packing is Packing.best_fit and self.max_documents_per_sequence is not None:
            found["max_documents_per_sequence"] = self.max_documents_per_sequence
        if self.fill_in_the_middle is not None and self.fill_in_the_middle.rate:
            found["fill_in_the_middle"] = {
                **asdict(self.fill_in_the_middle),
                "sources": list(self.fill_in_the_middle.sources),
            }
        return found
