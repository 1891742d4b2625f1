"""Configuration of the corpus pipeline and the loader. Imports without torch."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class SourceFormat(StrEnum):
    """How a source's files are read; all but parquet may be compressed (.gz, .zst)."""

    auto = "auto"
    """From each file's name."""
    jsonl = "jsonl"
    parquet = "parquet"
    txt = "txt"
    """One document a file."""
    tree = "tree"
    """Every text file under a directory, one document a file."""


class Packing(StrEnum):
    """How documents become sequences of equal length."""

    concatenate = "concatenate"
    """Documents one after the other, cut at the sequence length: nothing is padded, documents may be split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One named source of documents; the mixture and every report go by its name."""

    name: str = MISSING
    path: str = MISSING
    """A file, a directory, or a glob."""
    format: SourceFormat = SourceFormat.auto
    text_field: str = "text"
    """Field that holds the text, for jsonl and parquet."""
    id_field: str = "id"
    """Field that holds the document's id, for jsonl and parquet; without it, ids are made from source and position."""
    include: tuple[str, ...] = ()
    """Globs on the path relative to a tree, `**/*.py`; empty takes every text file."""
    exclude: tuple[str, ...] = ()
    """Globs on the path relative to a tree that are passed over."""
    limit_bytes: int | None = None
    """Read at most this much raw text, in the order of the file names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """Normalisation (NFC, line ends, control characters) and the smallest filters."""

    min_characters: int = 32
    """Shorter documents are dropped."""
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
class StagesConfig:
    """The stages between reading and tokenising."""

    clean: CleanConfig = field(default_factory=CleanConfig)
    exact_dedup: bool = True
    """Drop documents whose normalised text was seen before (xxh3-128)."""
    near_dedup: NearDedupConfig = field(default_factory=NearDedupConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """A tokenizer that exists (`path`) or one trained on the corpus (byte-level BPE)."""

    path: str | None = None
    """A `tokenizer.json` to use as it is."""
    vocabulary_size: int = 32768
    """Size of a trained vocabulary, special tokens included; a multiple of 128."""
    sample_bytes: int = 100_000_000
    """Text that training may look at, divided over the sources by their weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Documents that are held out of training, chosen by a hash of their id, the same in every later run."""

    share: float = 0.01
    """Share of each source's documents."""


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
    shard_tokens: int = 100_000_000
    """Tokens after which a shard of the store is sealed."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of each source in the training samples, normalised to 1; empty: in proportion to its tokens."""
    packing: Packing = Packing.concatenate
    mask_documents: bool = True
    """Attention and positions do not cross document borders inside a sequence."""
