"""Deduplication beside its peers: speed, memory, growth, recall and false removals, files in, files out.

    python benchmarks/dedup.py [--megabytes 28] [--scales 1 4 16] [--peers-at 4] [--json FILE]

One corpus (benchmarks/texts.py), jsonl. Each row is a command that reads it and writes the kept records as jsonl: ours
is `bloomery data dedup`, which brings texts into one form, removes copies, then near-duplicates, and verifies; peers
(benchmarks/peers.py, extra `bench`; one that is not installed is left out) remove what shares a band. Counted are user
and system seconds of all processes, imports included, and the highest memory of one; a first run on a tiny corpus, not
counted, leaves our compiled kernels in numba's cache. Recall (of the pairs at Jaccard 0.8 or more, those of which not
both were kept) and false removals (documents removed though nothing that was kept resembles them) are against all
pairs, exactly (benchmarks/truth.py).

Bars, at four times 28 MB: 10 MB per CPU second and more than each peer (Daft is an engine, not a peer: no bar), recall
0.995, no false removal, less than 1 GiB; and cost that grows linearly.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import bloomery, measured

HERE = Path(__file__).parent
OURS = "bloomery"
PEERS = ("rensa", "datasketch", "datatrove")
ENGINES = ("daft",)
MINIMUM_SPEED = 10.0
MINIMUM_RECALL = 0.995
LARGEST_BYTES = 1 << 30


def command(name: str, corpus: Path, output: Path) -> list[str]:
    """What is run for a row."""
    if name == OURS:
        return bloomery("data", "dedup", corpus, "--output", output)
    return [sys.executable, str(HERE / "peers.py"), name, str(corpus), str(output)]


def measure(name: str, corpus: Path, output: Path, facts: dict[str, int]) -> dict[str, Any]:
    """One row."""
    output.mkdir()
    used, _ = measured(command(name, corpus, output))
    return {
        "name": name,
        **facts,
        **used,
        "mb_per_cpu_second": facts["text_bytes"] / used["cpu_seconds"] / 1e6,
        "documents_per_second": facts["documents"] / used["seconds"],
    }


def call(script: str, *arguments: object) -> dict[str, Any]:
    """A script beside this one, in a process of its own."""
    words = [sys.executable, str(HERE / script), *map(str, arguments)]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)


def shown(row: dict[str, Any]) -> str:
    """A line of the table."""
    text = (
        f"{row['name']:<11}{row['text_bytes'] / 1e6:6.0f}{row['documents']:10,}{row['seconds']:9.1f}"
        f"{row['cpu_seconds']:9.1f}{row['mb_per_cpu_second']:10.1f}{row['documents_per_second']:9,.0f}"
        f"{row['peak_bytes'] / 2**20:10,.0f}"
    )
    if "recall" in row:
        text += f"{row['recall']:9.4f}{row['removed']:9,}{row['false_removals']:7,}"
    return text


def shortfalls(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Bars that are not met, in the rows that stand beside the peers."""
    beside = {row["name"]: row for row in rows if "recall" in row}
    ours = beside[OURS]
    if ours["mb_per_cpu_second"] < MINIMUM_SPEED:
        yield f"{ours['mb_per_cpu_second']:.1f} MB per CPU second: the bar is {MINIMUM_SPEED}"
    if ours["peak_bytes"] >= LARGEST_BYTES:
        yield f"peak {ours['peak_bytes'] / 2**20:.0f} MiB: the bar is 1024"
    if ours["recall"] < MINIMUM_RECALL or ours["false_removals"]:
        yield f"recall {ours['recall']:.4f}, {ours['false_removals']} false removals: bars {MINIMUM_RECALL} and 0"
    for peer in PEERS:
        if peer in beside and beside[peer]["mb_per_cpu_second"] >= ours["mb_per_cpu_second"]:
            yield f"{peer} is ahead"


def main() -> int:
    """Prints the table; exit code 1 where a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=28, help="text in the corpus at scale 1")
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--peers-at", type=int, default=4, help="the scale at which the peers run, and the truth is found"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        tiny = call("texts.py", directory / "tiny", 100_000)
        measure(OURS, directory / "tiny", directory / "tiny-out", tiny)
        print(
            f"{'':<11}{'MB':>6}{'documents':>10}{'seconds':>9}{'CPU s':>9}{'MB/CPU s':>10}{'docs/s':>9}{'peak MiB':>10}"
            f"{'recall':>9}{'removed':>9}{'false':>7}"
        )
        for scale in options.scales:
            corpus = directory / f"corpus-{scale}"
            facts = call("texts.py", corpus, scale * options.megabytes * 1_000_000)
            beside = scale == options.peers_at
            others = [name for name in (*PEERS, *ENGINES) if importlib.util.find_spec(name)] if beside else []
            outputs = {name: directory / name for name in (OURS, *others)}
            found = [measure(name, corpus, output, facts) for name, output in outputs.items()]
            if beside:
                judged = call("truth.py", corpus, *outputs.values())
                found = [{**row, **judged[str(outputs[row["name"]])]} for row in found]
            print("\n".join(map(shown, found)), flush=True)
            rows += found
            for path in (corpus, *outputs.values()):
                shutil.rmtree(path)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    missed = list(shortfalls(rows)) if options.peers_at in options.scales else []
    print("\n".join(missed) or "every bar is met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
