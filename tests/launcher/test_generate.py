"""Texts from checkpoints: what `transformers` is asked for is what comes, and what it may not do it does not."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from launcher.conversion.check import compare_logits
from launcher.conversion.export import Weights, described_model
from launcher.conversion.in_memory import in_memory
from launcher.generation.filling import Filler
from launcher.generation.options import Options
from launcher.generation.streaming import Streamer
from launcher.generation.writer import Writer
from launcher.places import find_checkpoint
from launcher.verify.world import run_world
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError
from tests.launcher.test_encoders import make
from tests.launcher.test_finetune import ANSWERS, base, chats, tuned  # noqa: F401
from tests.launcher.tiny import configuration, ran, run

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("transformers_imported")]


def alone(function: Any) -> Any:
    """In a forked process, which may run what a parent of forks may not."""
    return run_world(function, 1)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    ran("train", configuration(directory, store, train={"steps": 40}))
    return directory / "run"


@pytest.mark.truth
def test_every_way_of_decoding_keeps_its_word(trained: Path) -> None:
    def compute() -> dict[str, Any]:
        writer = Writer.of(find_checkpoint(str(trained)))
        prompts = [writer.read("iron ore"), writer.read("air")]

        def written(**options: Any) -> list[str]:
            return writer.write(prompts, Options(tokens=24, **options))

        greedy = written()
        by_hand = [by_argmax(writer.model, ids, 24, writer.tokenizer) for ids in prompts]
        beams = written(beams=4)
        return {
            "greedy": (greedy, by_hand),
            "one by one": [writer.write([ids], Options(tokens=24))[0] for ids in prompts],
            "top 1": written(temperature=5.0, top_k=1),
            "tiny nucleus": written(temperature=1.0, top_p=1e-6),
            "seeds": [written(temperature=1.0, seed=seed) for seed in (1, 1, 2)],
            "stop": (written(stop=("ham", greedy[0][5:8])), greedy[0].find(greedy[0][5:8])),
            "scores": [
                [score(writer, ids, text) for ids, text in zip(prompts, texts, strict=True)]
                for texts in (greedy, beams)
            ],
            "trigrams": [trigrams(writer.tokenizer, text) for text in written(beams=3, no_repeat_ngram=3)],
            "short": [len(text) for text in written(beams=4, length_penalty=-5.0)],
            "long": [len(text) for text in written(beams=4, length_penalty=5.0)],
        }

    found = alone(compute)
    greedy, by_hand = found["greedy"]
    assert greedy == by_hand == found["one by one"] == found["top 1"] == found["tiny nucleus"]
    first, again, other = found["seeds"]
    assert first == again != other
    stopped, place = found["stop"]
    assert stopped[0] == greedy[0][:place]
    assert all(wide >= narrow - 1e-4 for narrow, wide in zip(*found["scores"], strict=True))
    assert all(len(set(each)) == len(each) > 5 for each in found["trigrams"])
    assert all(short <= long for short, long in zip(found["short"], found["long"], strict=True))


def by_argmax(model: Any, prompt: list[int], new: int, tokenizer: Tokenizer) -> str:
    """One full forward a token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.end_of_document:
                break
            ids.append(token)
    return tokenizer.decode(ids[len(prompt) :])


def score(writer: Writer, prompt: list[int], text: str) -> float:
    """Log-likelihood of a text of a given length, a token on average."""
    ids = writer.tokenizer.encode_batch([text])[0]
    with torch.no_grad():
        logits = writer.model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(dim=-1)
    places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
    return sum(float(logits[place, token]) for place, token in zip(places, ids, strict=True)) / max(1, len(ids))


def trigrams(tokenizer: Tokenizer, text: str) -> list[tuple[int, ...]]:
    ids = tokenizer.encode_batch([text])[0]
    return list(zip(ids, ids[1:], ids[2:], strict=False))


def test_the_model_in_memory_computes_what_ours_does(trained: Path) -> None:
    def compute() -> None:
        checkpoint = find_checkpoint(str(trained))
        tensors = Weights(StoredTensors(checkpoint.path))
        model = described_model(checkpoint.config(), tensors)
        weights = {name: tensors.read(name) for name in tensors.shapes}
        compare_logits(model, weights, in_memory(checkpoint), sequence_length=32)
        weights["decoder.final_norm.weight"] = weights["decoder.final_norm.weight"] * 1.01
        with pytest.raises(UserError, match="the logits differ"):
            compare_logits(model, weights, in_memory(checkpoint), sequence_length=32)

    alone(compute)


def test_samples_are_kept_and_prompts_come_from_anywhere(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("iron\n\nore clay\n")
    arguments = ("generate", trained, "--file", tmp_path / "prompts.txt", "--prompt", "air", "--tokens", "6")
    first = ran(*arguments, "--json", tmp_path / "out.json")
    assert [sample["prompt"] for sample in json.loads((tmp_path / "out.json").read_text())] == [
        "air",
        "iron",
        "ore clay",
    ]
    assert run(*arguments) == ([0], first)
    for wrong, told in (
        (("--top-k", "3"), "--temperature is 0"), (("--beams", "0"), "--beams is 0"),
        (("--top-p", "2"), "--top-p is 2"), (("--length-penalty", "2"), "--beams above 1"),
        (("--file", "nowhere"), "no file nowhere"), (("--system", "x"), "--system is for --chat"),
        (("--stop", ""), "--stop is empty"), (("--temperature", "-1"), "--temperature is -1"),
    ):  # fmt: skip
        codes, said = run("generate", trained, *wrong)
        assert (codes, told in said) == ([2], True), said


def test_a_conversation_is_answered(base: Path, chats: Path, tmp_path: Path) -> None:  # noqa: F811
    train = {"steps": 60, "sequence_length": 64, "objective": "answers", "global_batch_size": 8}
    config = tuned(tmp_path / "tuned", chats, base, train=train)
    ran("train", config)
    arguments = ("generate", tmp_path / "tuned" / "run", "--chat", "--prompt", "iron", "--prompt", "air")
    said = ran(*arguments, "--tokens", "12")
    first, second = said.strip().split("\n\n")
    for asked, found in (("iron", first), ("air", second)):
        assert found.startswith(f"{asked}\n> ")
        assert found.partition("> ")[2] in ANSWERS.values()  # a whole answer, and nothing behind the end of the turn


def test_gaps_are_filled_and_spans_are_told(store: Path, tmp_path: Path) -> None:
    for name in ("bert", "t5"):
        config = make(tmp_path / name, store, name, train={"steps": 6})
        ran("train", config)
    said = ran("generate", tmp_path / "bert" / "run", "--prompt", "iron [MASK] clay[MASK]")
    assert said.startswith("iron")
    assert len(said.splitlines()[1].split("  ")) == 6
    codes, said = run("generate", tmp_path / "bert" / "run", "--prompt", "iron")
    assert (codes, "has no [MASK]" in said) == ([2], True)
    said = ran("generate", tmp_path / "t5" / "run", "--prompt", "iron [MASK] clay", "--tokens", "8", "--beams", "2")
    assert said.startswith("iron [MASK] clay\n> ")

    def compute() -> tuple[list[list[tuple[str, float]]], list[int], int]:
        filler = Filler.of(find_checkpoint(str(tmp_path / "bert" / "run")))
        return filler.fill("iron [MASK]")[1], filler.read("iron [MASK]"), filler.mask

    ((candidates,), ids, mask) = alone(compute)
    assert [share for _, share in candidates] == sorted((share for _, share in candidates), reverse=True)
    assert 0 < sum(share for _, share in candidates) <= 1
    assert ids.count(mask) == 1


def test_a_stream_says_whole_letters_and_nothing_behind_a_stop(store: Path) -> None:
    tokenizer = Tokenizer.load(Store.open(store).tokenizer)
    text = "iron 铁 ore STOP slag"
    ids = tokenizer.encode_batch([text])[0]
    for stop, expected in (((), text), (("STOP",), "iron 铁 ore ")):
        said: list[str] = []
        streamer = Streamer(tokenizer.decode, said.append, ends=[tokenizer.end_of_document], stop=stop)
        streamer.put(torch.tensor([[1, 2, 3]]))
        for token in [*ids, tokenizer.end_of_document]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(said) == expected
        assert len(said) > 3
        assert not any("\ufffd" in each for each in said)
    assert list(itertools.chain(*said))
