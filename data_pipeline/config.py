"""Configuration of the corpus pipeline and the loader. Imports without torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from data_pipeline.corruption import MaskingConfig, SpansConfig
from data_pipeline.filters.config import FiltersConfig
from parallel.common.errors import Problem

_NAME = re.compile(r"[\w.-]+")
_LANGUAGE = re.compile(r"[a-z]{2}|code")


class SourceFormat(StrEnum):
    """How a source's files are read; all but parquet may be compressed (.gz, .zst)."""

    auto = "auto"
    """From each file's name: .jsonl, .ndjson, .parquet, .txt, .warc, .wet; other files are passed over."""
    jsonl = "jsonl"
    """One JSON object a line."""
    parquet = "parquet"
    txt = "txt"
    """One document a file, a long file in pieces (`document_bytes`)."""
    warc = "warc"
    """A web archive: WET files hold text, of WARC files the pages' main text is taken (extra `warc`)."""
    tree = "tree"
    """Every text file under a directory, one document a file; links and binary files are passed over."""
    datasets = "datasets"
    """A split of a Hugging Face dataset: its name on the Hub, or a directory; read in order, streaming."""


class Packing(StrEnum):
    """How documents become sequences of equal length."""

    concatenate = "concatenate"
    """Documents one after the other, cut at the sequence length: nothing is padded, documents may be split."""
    best_fit = "best_fit"
    """Whole documents, each in the fullest sequence that it fits in: only longer ones are cut, the rest is padded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One named source of documents; the mixture and every report go by its name."""

    name: str = MISSING
    path: Any = MISSING
    """A file, a directory, a glob or a URL (s3://, gs://, hf://; a file or a directory), or a list of them; of a
    Hugging Face dataset one name or one directory."""
    format: SourceFormat = SourceFormat.auto
    text_field: str = "text"
    """Field that holds the text, for jsonl, parquet and datasets."""
    id_field: str = "id"
    """Field that holds the document's id, likewise; without it, ids are made from source and position."""
    split: str = "train"
    """Split that is read, for datasets."""
    subset: str | None = None
    """Subset (configuration) that is read, for datasets that have several."""
    include: tuple[str, ...] = ()
    """Globs on the path relative to a directory, `lib/**/*.py`, or on the name alone, `*.py`; empty takes all."""
    exclude: tuple[str, ...] = ()
    """Globs, as in `include`, of what is passed over."""
    limit_bytes: int | None = None
    """Read at most this much text: of a tree, files spread over all of it; else in the order of the file names."""
    document_bytes: int = 65_536
    """A txt file longer than this is cut at empty lines, else at line ends, into such pieces; 0 never cuts."""
    language: str | None = None
    """What it is written in: a two-letter code, `zh`, which the language filter then asks for, or `code` for source
    code, of which rules for prose are not asked."""
    weight: float | None = None
    """Its share in the training samples, where `data.mixture` is empty; then every source has one."""

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a list."""
        return tuple(self.path) if isinstance(self.path, list | tuple) else (self.path,)


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """Normalisation (NFC, line ends, control characters) and the smallest filters."""

    min_characters: int = 20
    """Shorter documents are dropped; the shortest Chinese poems have twenty characters."""
    max_characters: int = 1_000_000
    """Longer documents are dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDedupConfig:
    """Near-duplicate removal: MinHash bands give candidates, exact Jaccard over shingles decides."""

    enabled: bool = True
    threshold: float = 0.8
    """Jaccard similarity from which two documents are near-duplicates."""
    ngram: int = 5
    """Tokens in a shingle (one CJK character, else a run of word characters, is a token)."""
    bands: int = 20
    """Bands of the signature; any equal band makes a candidate pair."""
    rows: int = 6
    """MinHash values in a band."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminateConfig:
    """Documents that hold a stretch of an evaluation file are dropped."""

    files: tuple[str, ...] = ()
    """Evaluation files (jsonl or txt, plain, .gz or .zst); every text field of a record, or every line, is an item."""
    ngram: int = 13
    """Tokens in a stretch (as in near_dedup); shorter items cannot be looked for, and are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesConfig:
    """The stages between reading and tokenising."""

    clean: CleanConfig = field(default_factory=CleanConfig)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    """Quality, repetition, language, length, personal data; all off by default."""
    exact_dedup: bool = True
    """Drop documents whose normalised text was seen before (xxh3-128)."""
    near_dedup: NearDedupConfig = field(default_factory=NearDedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    max_dropped_share: float = 0.95
    """A stage that drops a larger share of a source's documents (100 or more) stops the build; 1 never does."""


class Encoding(StrEnum):
    """What computes the ids; they are the same."""

    tokenizers = "tokenizers"
    gigatoken = "gigatoken"
    """Much faster (extra `fast`), checked against `tokenizers` on a sample, which takes over where they differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """A tokenizer that exists (`path`) or one trained on the corpus (byte-level BPE)."""

    path: str | None = None
    """A `tokenizer.json` to use as it is."""
    vocabulary_size: int = 32768
    """Size of a trained vocabulary, special tokens included; a multiple of 128."""
    sample_bytes: int = 100_000_000
    """Text that training may look at, divided over the sources as the mixture says, else by their size."""
    encoder: Encoding = Encoding.tokenizers


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Documents that are held out of training, chosen by a hash of their id, the same in every later run."""

    share: float = 0.01
    """Share of each source's documents. A source with two documents or more gives at least one, unless this is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseConfig:
    """From a step on, another mixture or another length; what is left out stays as it was."""

    from_step: int = MISSING
    """First optimizer step of the phase, counted from 0."""
    mixture: dict[str, float] = field(default_factory=dict)
    """As `data.mixture`; empty: that of the phase before."""
    sequence_length: int | None = None
    """Attention and positions begin anew after this many tokens, a divisor of train.sequence_length: short contexts
    first, with the same number of tokens in every step. None: as in the phase before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FillInTheMiddleConfig:
    """Documents turned into prefix, suffix, middle, so that a model learns to fill gaps (Bavarian et al. 2022)."""

    rate: float = 0.0
    """Share of the documents that are turned; 0 switches it off."""
    suffix_first: float = 0.5
    """Share of those in which the suffix stands before the prefix."""
    sources: tuple[str, ...] = ()
    """Only in these sources, for example code; empty: in all."""


class Engine(StrEnum):
    """Where the stages of a corpus job do their work."""

    native = "native"
    """On the cores of this machine."""
    ray = "ray"
    """On a Ray cluster (extra `ray`) that sees the store's directory; in a Slurm job over its nodes. Same bytes."""


class IndexKind(StrEnum):
    """How a growing store remembers what it has seen."""

    verified = "verified"
    """Bands in a key-value store on disk; what shares one is compared with the kept text, exactly."""
    bloom = "bloom"
    """Bands in Bloom filters of a size stated in advance (LSHBloom); what shares one is dropped unseen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowConfig:
    """A store that grows by sealed shards (`bloomery data grow`)."""

    portion_bytes: int = 64 << 20
    """Text of each source that is worked on at a time, and becomes a shard; training waits for whole ones."""
    idle_seconds: float = 0.0
    """When all files are read: wait so long for new ones before the store is finished. 0: finish at once."""
    index: IndexKind = IndexKind.verified
    bloom_documents: int = 100_000_000
    """Kept documents for which the Bloom filters are laid out."""
    bloom_false_share: float = 1e-4
    """Share of new documents that full filters would drop by chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """From raw text to batches."""

    sources: list[SourceConfig] = field(default_factory=list)
    """What `bloomery data build` reads."""
    store: str = MISSING
    """Token-store directory that `data build` writes and `train` reads."""
    stages: StagesConfig = field(default_factory=StagesConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    engine: Engine = Engine.native
    grow: GrowConfig = field(default_factory=GrowConfig)
    shard_tokens: int = 100_000_000
    """Tokens after which a shard of the store is sealed."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of each source in the training samples, normalised to 1; empty: in proportion to its tokens."""
    schedule: list[PhaseConfig] = field(default_factory=list)
    """Changes of mixture and sequence length at later steps; only what lies behind a run's step may change."""
    packing: Packing = Packing.concatenate
    max_documents_per_sequence: int | None = None
    """With best_fit: at most so many documents, or pieces of them, in a sequence."""
    fill_in_the_middle: FillInTheMiddleConfig = field(default_factory=FillInTheMiddleConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    spans: SpansConfig = field(default_factory=SpansConfig)
    follow: bool = False
    """Train while the store still grows (`bloomery data grow`): wait where it is behind."""
    follow_seconds: float = 1800.0
    """Longest wait for the store to grow."""
    mask_documents: bool = True
    """Attention and positions do not cross document borders inside a sequence."""

    @property
    def weights(self) -> dict[str, float]:
        """The mixture, or the weights of the sources where it is empty; empty where none has one."""
        given = {source.name: source.weight for source in self.sources if source.weight is not None}
        return dict(self.mixture) or given

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the values for a build; types and required keys are checked before."""
        if not self.sources:
            yield Problem(key="data.sources", got=[], legal="at least one source, {name: ..., path: ...}")
        seen: set[str] = set()
        for index, source in enumerate(self.sources):
            key = f"data.sources.{index}"
            if not _NAME.fullmatch(source.name) or source.name in seen:
                legal = "a name of its own, of letters, digits, `.`, `_` and `-`"
                yield Problem(key=f"{key}.name", got=source.name, legal=legal)
            seen.add(source.name)
            if not source.paths or not all(isinstance(path, str) and path for path in source.paths):
                yield Problem(key=f"{key}.path", got=source.path, legal="a file, a directory or a glob, or a list")
            if source.limit_bytes is not None and source.limit_bytes < 1:
                yield Problem(key=f"{key}.limit_bytes", got=source.limit_bytes, legal="1 or more, or null for all")
            if source.document_bytes and source.document_bytes < 1024:
                yield Problem(key=f"{key}.document_bytes", got=source.document_bytes, legal="1024 or more, or 0")
            if source.weight is not None and not 0 <= source.weight < float("inf"):
                yield Problem(key=f"{key}.weight", got=source.weight, legal="a number of 0 or more")
            if source.language is not None and not _LANGUAGE.fullmatch(source.language):
                yield Problem(key=f"{key}.language", got=source.language, legal="a code such as en or zh, or code")
            yield from _dataset_problems(key, source)
        weighted = [source.name for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            yield Problem(
                key="data.sources", got=f"a weight at {', '.join(weighted)} only", legal="one at every source"
            )
        yield from self.stages.filters.problems("data.stages.filters")
        yield from _own_filters_problems(self)
        clean, near = self.stages.clean, self.stages.near_dedup
        ranges = (
            ("stages.clean.min_characters", clean.min_characters, 0, clean.max_characters),
            ("stages.near_dedup.threshold", near.threshold, 0.05, 1),
            ("stages.near_dedup.ngram", near.ngram, 1, 100),
            ("stages.near_dedup.bands", near.bands, 1, 1000),
            ("stages.near_dedup.rows", near.rows, 1, 100),
            ("stages.decontaminate.ngram", self.stages.decontaminate.ngram, 1, 100),
            ("stages.max_dropped_share", self.stages.max_dropped_share, 0, 1),
            ("validation.share", self.validation.share, 0, 0.5),
            ("tokenizer.sample_bytes", self.tokenizer.sample_bytes, 1, None),
            ("shard_tokens", self.shard_tokens, 1, None),
            ("grow.portion_bytes", self.grow.portion_bytes, 1, None),
            ("grow.idle_seconds", self.grow.idle_seconds, 0, None),
            ("grow.bloom_documents", self.grow.bloom_documents, 1, None),
            ("grow.bloom_false_share", self.grow.bloom_false_share, 1e-12, 0.5),
        )
        for key, got, least, most in ranges:
            if got < least or (most is not None and got > most):
                legal = f"{least} or more" if most is None else f"a number from {least} to {most}"
                yield Problem(key=f"data.{key}", got=got, legal=legal)


def training_problems(config: DataConfig, sequence_length: int) -> Iterator[Problem]:
    """What is wrong with the values that training reads."""
    steps = [phase.from_step for phase in config.schedule]
    for number, phase in enumerate(config.schedule):
        key = f"data.schedule.{number}"
        if phase.from_step < 0 or phase.from_step in steps[:number]:
            yield Problem(key=f"{key}.from_step", got=phase.from_step, legal="a step of its own, 0 or more")
        length = phase.sequence_length
        if length is not None and (length < 1 or sequence_length % length):
            legal = f"a divisor of train.sequence_length = {sequence_length}"
            yield Problem(key=f"{key}.sequence_length", got=length, legal=legal)
        elif length is not None and length < sequence_length and not config.mask_documents:
            legal = "left out with data.mask_documents=false, which lets attention cross every border"
            yield Problem(key=f"{key}.sequence_length", got=length, legal=legal)
        for name, weight in phase.mixture.items():
            if not 0 <= weight < float("inf"):
                yield Problem(key=f"{key}.mixture.{name}", got=weight, legal="a share of 0 or more")
    middle = config.fill_in_the_middle
    for key, share in (("rate", middle.rate), ("suffix_first", middle.suffix_first)):
        if not 0 <= share <= 1:
            yield Problem(key=f"data.fill_in_the_middle.{key}", got=share, legal="a number from 0 to 1")
    yield from config.masking.problems()
    yield from config.spans.problems()
    most = config.max_documents_per_sequence
    if most is not None and (most < 1 or config.packing is not Packing.best_fit):
        legal = "1 or more, with data.packing=best_fit"
        yield Problem(key="data.max_documents_per_sequence", got=most, legal=legal)
    if not config.follow_seconds > 0:
        yield Problem(key="data.follow_seconds", got=config.follow_seconds, legal="seconds above 0")


def _own_filters_problems(config: DataConfig) -> Iterator[Problem]:
    if config.stages.filters.own and config.engine is Engine.ray:
        legal = "native with data.stages.filters.own: Ray's workers do not know of plugins"
        yield Problem(key="data.engine", got=config.engine.value, legal=legal)


def _dataset_problems(key: str, source: SourceConfig) -> Iterator[Problem]:
    """What is wrong with a Hugging Face dataset, or is said only of one and stands at another source."""
    if source.format is SourceFormat.datasets:
        if len(source.paths) != 1:
            yield Problem(key=f"{key}.path", got=source.path, legal="one name or directory with format=datasets")
        for name in ("include", "exclude"):
            if getattr(source, name):
                legal = "nothing with format=datasets, which reads a whole split"
                yield Problem(key=f"{key}.{name}", got=getattr(source, name), legal=legal)
    elif source.subset is not None or source.split != "train":
        name, got = ("subset", source.subset) if source.subset is not None else ("split", source.split)
        yield Problem(key=f"{key}.{name}", got=got, legal="left out, or format=datasets")
