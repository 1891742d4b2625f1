"""The fast encoder: the same store byte for byte, or a warning and the same store."""

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline import encoder
from data_pipeline.build import build
from data_pipeline.config import DataConfig, Encoding, GrowConfig, TokenizerConfig
from data_pipeline.encoder import Encoder
from data_pipeline.growth.job import grow
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import UserError
from tests.data_pipeline import test_build, test_grow
from tests.data_pipeline.stores import small_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, and a tokenizer with the splitting of GPT-2."""
    directory = test_build.write_corpus(tmp_path_factory.mktemp("corpus"), documents=150)
    backend = HuggingFaceTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(test_grow.records(directory).values(), trainer)
    backend.save(str(directory / "tokenizer.json"))
    return directory


def config_of(corpus: Path, store: Path, kind: Encoding, **fields: Any) -> DataConfig:
    tokenizer = TokenizerConfig(path=str(corpus / "tokenizer.json"), encoder=kind)
    return test_build.config_of(corpus, store, tokenizer=tokenizer, **fields)


def test_it_gives_the_same_ids_and_special_tokens_are_text(corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    fast = Encoder(tokenizer, Encoding.gigatoken)
    assert fast._fast is not None
    texts = [*test_grow.records(corpus).values(), "a <|endoftext|> b<|reserved_00|>", "", " \n\n\t 中文e\u0301🙂"]
    assert fast.encode_batch(texts) == tokenizer.encode_batch(texts)


@pytest.mark.parametrize("broken", [False, True])
def test_a_store_has_the_same_bytes_even_where_it_errs(
    corpus: Path, tmp_path: Path, broken: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The planted bug changes an id in the second shard's last text; what is begun of the shard is thrown away."""
    build(config_of(corpus, tmp_path / "plain", Encoding.tokenizers, shard_tokens=5_000))
    monkeypatch.setattr("data_pipeline.build._ENCODED_BYTES", 4_000)
    calls: list[int] = []
    if broken:
        opened = Encoder._opened

        def faulty(self: Encoder) -> Any:
            fast = opened(self)

            class Faulty:
                def encode_batch_list(self, texts: list[str]) -> list[list[int]]:
                    calls.append(len(texts))
                    found = fast.encode_batch_list(texts)
                    return [[*ids[:-1], 7] for ids in found] if len(calls) > 12 else found

            return Faulty()

        monkeypatch.setattr(Encoder, "_opened", faulty)
    with caplog.at_level(logging.WARNING):
        build(config_of(corpus, tmp_path / "fast", Encoding.gigatoken, shard_tokens=5_000))
    assert ("gigatoken gives other ids" in caplog.text) == broken
    assert len(calls) == (13 if broken else 0)
    assert test_build.content_of(tmp_path / "fast") == test_build.content_of(tmp_path / "plain")


def test_a_growing_store_has_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    settings = GrowConfig(portion_bytes=30_000)
    plain, fast = (
        config_of(corpus, tmp_path / kind.value, kind, grow=settings, shard_tokens=100_000) for kind in Encoding
    )
    grow(plain)
    grow(fast)
    assert test_grow.content_of(tmp_path / "gigatoken") == test_grow.content_of(tmp_path / "tokenizers")


def test_a_tokenizer_that_it_does_not_know_is_left_to_tokenizers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = small_tokenizer()
    with caplog.at_level(logging.WARNING):
        own = Encoder(tokenizer, Encoding.gigatoken)
    assert "gigatoken cannot encode as this tokenizer does" in caplog.text
    assert own.encode_batch(["iron 中文"]) == tokenizer.encode_batch(["iron 中文"])
    monkeypatch.setattr(encoder, "gigatoken", encoder.Lazy("no_such_library"))
    with pytest.raises(UserError, match=r"pip install bloomery\[fast\]"):
        Encoder(tokenizer, Encoding.gigatoken)
