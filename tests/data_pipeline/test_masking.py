"""Covered tokens: how many, which, the same on every rank; and pairs of segments that know their documents."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline import tokenizer
from data_pipeline.corruption import MaskingConfig
from data_pipeline.loader import Loader, single_pass
from data_pipeline.marks import Marks, marks
from data_pipeline.masking import Masking
from data_pipeline.plan import Plan
from data_pipeline.store import Store, StoreWriter, TokenizedDocument
from data_pipeline.tokenizer import Tokenizer

WORDS = ("iron", "ore", "charcoal", "bellows", "furnaces", "slag", "hammering", "1234567", "Eisenhüttenstadt", "铁炉")
SEQUENCE = 48


def documents(count: int) -> list[str]:
    chosen = np.random.default_rng(5)
    return [" ".join(WORDS[word] for word in chosen.integers(len(WORDS), size=size)) for size in range(1, count + 1)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Documents of 1 to 60 words of several tokens each."""
    directory = tmp_path_factory.mktemp("masking")
    texts = documents(60)
    trained = tokenizer.train(iter(texts[:9]), 384, directory / "tokenizer.json")
    writer = StoreWriter(directory / "store", tokenizer=trained, configuration="test")

    def made(chosen: list[str], prefix: str) -> Iterator[TokenizedDocument]:
        for number, ids in enumerate(trained.encode_batch(chosen)):
            yield TokenizedDocument(id=f"{prefix}{number}", tokens=ids, text_bytes=1)

    writer.add_shard("web", "training", made(texts[:50], "t"))
    writer.add_shard("web", "validation", made(texts[50:], "v"))
    return writer.finish()


def loader(store: Store, form: str, *, ranks: int = 1, rank: int = 0, masking: MaskingConfig | None = None) -> Loader:
    return Loader(
        store, mixture={}, sequence_length=SEQUENCE, global_batch_size=4, micro_batch_size=1, dp_rank=rank,
        dp_size=ranks, seed=11, plan=Plan(form=form, masking=masking or MaskingConfig()),
    )  # fmt: skip


def rows(found: Loader, batches: int) -> dict[str, Tensor]:
    made = [found.next_batch() for _ in range(batches)]
    return {name: torch.cat([batch[name] for batch in made]) for name in made[0]}


def test_shares_are_those_of_the_paper(store: Store) -> None:
    found, known = rows(loader(store, "masked"), 100), marks(store)
    chosen, original = found["loss_weights"].bool(), found["labels"]
    ordinary = torch.from_numpy(known.is_ordinary)[original]
    assert not (chosen & ~ordinary).any(), "a special token was covered"
    per_row = ordinary.sum(dim=1)
    assert (chosen.sum(dim=1) == (0.15 * per_row).round().clamp(min=1)).float().mean() > 0.98  # halves round to even
    seen = found["tokens"]
    assert torch.equal(seen[~chosen], original[~chosen])
    covered = (seen[chosen] == known.mask).float().mean()
    same = (seen[chosen] == original[chosen]).float().mean()
    assert covered == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1, abs=0.03)
    others = seen[chosen & (seen != known.mask) & (seen != original)]
    assert torch.from_numpy(known.is_ordinary)[others].all()
    assert len(others.unique()) > 80


@pytest.mark.parametrize("form", ["masked", "pairs"])
def test_ranks_batches_and_resuming_change_nothing(store: Store, form: str) -> None:
    whole = rows(loader(store, form), 6)
    parts = [loader(store, form, ranks=2, rank=rank) for rank in (0, 1)]
    for step in range(6):
        batches = [part.next_batch() for part in parts]
        for name, tensor in whole.items():
            assert torch.equal(torch.cat([batch[name] for batch in batches]), tensor[4 * step : 4 * step + 4]), name
    resumed, first = loader(store, form), loader(store, form)
    for _ in range(3):
        first.next_batch()
    resumed.load_state_dict(first.state_dict())
    after = rows(resumed, 3)
    assert all(torch.equal(after[name], tensor[12:]) for name, tensor in whole.items())


def test_another_pass_covers_other_tokens(store: Store) -> None:
    """The masks are drawn for a sample of the global order, so the same text comes back with others."""
    masking = Masking(marks(store), MaskingConfig(), seed=1)
    tokens = rows(loader(store, "masked"), 1)["labels"][0].numpy()
    masks = [masking.cover(tokens, sample)[1] for sample in range(20)]
    assert sum(np.array_equal(one, other) for one, other in itertools.combinations(masks, 2)) == 0
    assert np.mean(masks, axis=0)[marks(store).is_ordinary[tokens]].std() < 0.15


def words_of(tokens: np.ndarray, known: Marks, tokens_of: Tokenizer) -> list[str]:
    begins = np.flatnonzero(known.word_begins(tokens)).tolist()
    pairs = itertools.pairwise([*begins, len(tokens)])
    return [tokens_of.decode(tokens[first:end].tolist()) for first, end in pairs]


def test_words_are_whole(store: Store) -> None:
    known, tokens_of = marks(store), Tokenizer.load(store.tokenizer)
    text = "charcoal, hammering Eisenhüttenstadt 12 铁锅 don't x1"
    found = words_of(np.array(tokens_of.encode_batch([text])[0]), known, tokens_of)
    words = [word.strip() for word in found if word.strip()]
    assert words == ["charcoal", ",", "hammering", "Eisenhüttenstadt", "12", "铁", "锅", "don", "'", "t", "x1"]


def test_whole_words_are_covered_whole(store: Store) -> None:
    known = marks(store)
    found = rows(loader(store, "masked", masking=MaskingConfig(whole_words=True)), 60)
    shares = []
    for labels, weights in zip(found["labels"].numpy(), found["loss_weights"].numpy(), strict=True):
        words = np.cumsum(known.word_begins(labels))
        for word in np.unique(words[weights > 0]):
            inside = (words == word) & known.is_ordinary[labels]
            assert weights[inside].all(), "a part of a word stayed"
        shares.append(weights.sum() / max(1, known.is_ordinary[labels].sum()))
    assert 0.08 < np.mean(shares) < 0.16


def test_pairs_know_their_documents(store: Store) -> None:
    known, found = marks(store), rows(loader(store, "pairs"), 200)
    text = {number: store.tokens(shard) for number, shard in enumerate(store.shards(split="training"))}[0]
    offsets = store.document_offsets(store.shards(split="training")[0])
    bodies = [text[first : end - 1].tolist() for first, end in itertools.pairwise(offsets.tolist())]
    follows = apart = 0
    for labels, ids, segment, answer in zip(
        found["labels"].numpy(), found["document_ids"].numpy(), found["segment_ids"].numpy(),
        found["next_sentence"].tolist(), strict=True,
    ):  # fmt: skip
        real = labels[ids == 0]
        assert real[0] == known.first
        assert (labels[ids == 1] == store.padding).all()
        ends = np.flatnonzero(real == known.separator)
        assert len(ends) == 2
        assert ends[1] == len(real) - 1
        first, second = real[1 : ends[0]].tolist(), real[ends[0] + 1 : -1].tolist()
        assert first
        assert second
        assert segment[: len(real)].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        together = any(_within(first + second, body) for body in bodies)
        holding = {number for number, body in enumerate(bodies) if _within(first, body)}
        assert holding
        if answer:
            assert together, "what is said to follow does not"
            follows += 1
        else:
            assert any(_within(second, body) for body in bodies)
            if min(len(first), len(second)) > 18:  # so long that no other document holds them by chance
                assert not holding & {number for number, body in enumerate(bodies) if _within(second, body)}
                apart += 1
    assert apart > 20
    assert follows / len(found["tokens"]) == pytest.approx(0.5, abs=0.06)


def _within(part: list[int], body: list[int]) -> bool:
    return any(body[place : place + len(part)] == part for place in range(len(body) - len(part) + 1))


def test_every_piece_of_a_document_comes_once_a_pass(store: Store) -> None:
    found = loader(store, "pairs")
    stream = found._streams[0]
    ids, labels = stream.read(np.arange(stream.samples_of_a_pass))
    pieces = sorted(tuple(row[:count].tolist()) for row, count in zip(ids, labels, strict=True))
    shard = store.shards(split="training")[0]
    text, offsets = store.tokens(shard), store.document_offsets(shard)
    room = SEQUENCE - 3
    expected = sorted(
        tuple(text[start : min(start + room, end - 1)].tolist())
        for first, end in itertools.pairwise(offsets.tolist())
        for start in range(first, end - 1, room)
        if min(start + room, end - 1) - start > 1
    )
    assert pieces == expected
    assert stream.tokens_before(stream.samples_of_a_pass) == sum(map(len, expected))


@pytest.mark.parametrize("form", ["masked", "pairs"])
def test_validation_is_the_same_each_time(store: Store, form: str) -> None:
    passes = [
        list(
            single_pass(
                store, "validation", sequence_length=SEQUENCE, global_batch_size=4, micro_batch_size=2, dp_rank=0,
                dp_size=1, plan=Plan(form=form),
            )
        )
        for _ in range(2)
    ]  # fmt: skip
    assert len(passes[0]) > 2
    for one, other in zip(*passes, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    counted = torch.cat([batch["loss_weights"].sum(dim=1) for batch in passes[0]])
    fills = torch.cat([batch["source"] for batch in passes[0]]) < 0
    assert (counted[fills] == 0).all()
    assert (counted[~fills] > 0).all()


@pytest.mark.parametrize(
    ("change", "key"),
    [({"share": 0.0}, "share"), ({"covered": 0.95}, "covered"), ({"exchanged": -0.1}, "exchanged")],
)
def test_wrong_shares_are_named(change: dict[str, float], key: str) -> None:
    assert f"data.masking.{key}" in {problem.key for problem in MaskingConfig(**change).problems()}
