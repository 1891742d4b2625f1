"""Some rounds of `benchmarks/kill_corpus.py`: killed at any moment, a job ends with an undisturbed one's bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """`data build` and `data grow`, forked from one process that has imported everything and done nothing yet."""
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "kill_corpus.py"), "--rounds=3", "--documents=80"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"--json={tmp_path / 'found.json'}"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    for word in ("build", "grow"):
        assert (found[word]["kills"], found[word]["differing"]) == (3, [])
