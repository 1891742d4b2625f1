"""Corpus jobs that are killed at random moments end with the same bytes as one that is not.

    python benchmarks/kill_corpus.py --rounds 50

Makes a small corpus (two sources, copies and near-copies), builds and grows a store of it undisturbed, then kills
`data build` and `data grow` with SIGKILL at random moments until each has died that often, always going on with the
same command; a job that finishes before its kill is begun anew in an empty directory. At the end every file is
compared by hash (but for the index of the growing store, which is made anew where it is lost). Each job is a process
of its own, forked from one that has imported everything and done nothing: a kill falls into the work, not the imports.
"""

import argparse
import gzip
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import yaml

from launcher.data import main as data
from parallel.common.files import hash_file, write_json

WORDS = ("iron", "ore", "slag", "coal", "bloom", "hammer", "anvil", "中文", "größer", "ふいご")


def write_corpus(directory: Path, documents: int) -> list[dict[str, str]]:
    """Two gzipped sources; a tenth of the documents are copies, a tenth near-copies."""
    chance = random.Random(5)
    sources = []
    for name in ("web", "books"):
        texts: list[str] = []
        for number in range(documents):
            text = " ".join(f"{chance.choice(WORDS)}{chance.randrange(60)}" for _ in range(chance.randrange(20, 300)))
            if number % 10 == 3:
                text = texts[-1]
            elif number % 10 == 6:
                text = texts[-1] + " and a little more"
            texts.append(text)
        file = directory / f"{name}.jsonl.gz"
        with gzip.open(file, "wt", encoding="utf-8") as opened:
            opened.writelines(json.dumps({"id": f"{name}-{n}", "text": t}) + "\n" for n, t in enumerate(texts))
        sources.append({"name": name, "path": str(file)})
    return sources


def content_of(store: Path) -> dict[str, str]:
    """Hash of every file, by name."""
    files = (file for file in sorted(store.rglob("*")) if file.is_file() and "index" not in file.parts)
    return {str(file.relative_to(store)): hash_file(file) for file in files}


class Job:
    """A word of `bloomery data` at work in a process of its own."""

    def __init__(self, word: str, config: Path, store: Path) -> None:
        self._said = store.with_suffix(".txt")
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            code = 1
            try:
                with self._said.open("w") as said:
                    os.dup2(said.fileno(), 1)
                    os.dup2(said.fileno(), 2)
                    code = data([word, str(config), f"data.store={store}"])
                    sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self) -> None:
        """Until it has finished.

        Raises:
            SystemExit: it failed.
        """
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        if code:
            raise SystemExit(f"exit code {code}:\n{self._said.read_text()}")

    def kill(self, seconds: float) -> bool:
        """Lets it work so long; whether it was still at work then."""
        watched = os.pidfd_open(self.process)
        try:
            select.select([watched], [], [], seconds)
        finally:
            os.close(watched)
        os.kill(self.process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]) == -signal.SIGKILL


def rounds(word: str, config: Path, directory: Path, wanted: int, chance: random.Random) -> dict[str, object]:
    """One word: killed so often, the stores that came out compared."""
    whole = directory / f"{word}-whole"
    started = time.monotonic()
    Job(word, config, whole).wait()
    seconds = time.monotonic() - started
    expected = content_of(whole)
    kills = stores = 0
    differing: list[str] = []
    while kills < wanted:
        store = directory / f"{word}-{stores}"
        # Each store dies some times on its way and is then let through.
        for _ in range(min(wanted - kills, chance.randrange(1, 8))):
            if not Job(word, config, store).kill(chance.uniform(0, seconds)):
                break  # it was done before: nothing is left to be killed
            kills += 1
        Job(word, config, store).wait()
        stores += 1
        found = content_of(store)
        names = {**found, **expected}
        differing += sorted(f"{store.name}/{n}" for n in names if found.get(n) != expected.get(n))
    print(f"{word}: {kills} kills over {stores} stores, {len(differing)} files differ", flush=True)
    return {"kills": kills, "stores": stores, "differing": differing, "undisturbed_seconds": seconds}


def main() -> int:
    """Both words; exit code 1 where a file differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="kills of each word")
    parser.add_argument("--documents", type=int, default=400, help="in each of the two sources")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = directory / "config.yaml"
        data = {
            "sources": write_corpus(directory, options.documents),
            "tokenizer": {"vocabulary_size": 384, "sample_bytes": 50_000},
            "shard_tokens": 20_000,
            "grow": {"portion_bytes": 40_000},
        }
        config.write_text(yaml.safe_dump({"data": data}, allow_unicode=True))
        found = {word: rounds(word, config, directory, options.rounds, chance) for word in ("build", "grow")}
    if options.json:
        write_json(options.json, found)
    return int(any(facts["differing"] for facts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
