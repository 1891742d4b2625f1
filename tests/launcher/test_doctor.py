"""The doctor: a line for everything, also where something is missing or broken; and the nodes of a job, compared."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from launcher.blame import BLAME_VARIABLE
from launcher.doctor import machine, packages
from launcher.doctor.finding import Finding, Health
from launcher.doctor.packages import EXTRAS, KNOWN_FAULTS, Wanted
from launcher.doctor.preflight import Measured, measure, suspects
from launcher.verify.world import run_world
from parallel.common.lines import JsonLines
from tests.launcher.test_train import records
from tests.launcher.tiny import command, configuration, environment, outcome_of, ran

_BLOCKER = """\
import importlib.abc, os, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in os.environ["MISSING"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name.split(".")[0] in os.environ["BROKEN"].split(","):
            raise ImportError(f"{name}: undefined symbol")

sys.meta_path.insert(0, Blocker())
"""


def examined(tmp_path: Path, *, missing: Sequence[str] = (), broken: Sequence[str] = ()) -> tuple[int, str, list[dict]]:
    """Exit code, lines and records of `bloomery doctor`, where some modules cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(_BLOCKER)
    variables = environment()
    variables |= {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{variables['PYTHONPATH']}",
        "MISSING": ",".join(missing),
        "BROKEN": ",".join(broken),
    }
    report = tmp_path / "report.json"
    done = subprocess.run(
        command("doctor", "--json", report), env=variables, text=True, capture_output=True, timeout=300, cwd=tmp_path
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads(report.read_text())


@pytest.mark.long
def test_with_everything_there_nothing_has_to_be_mended(tmp_path: Path) -> None:
    code, said, found = examined(tmp_path)
    assert code == 0, said
    assert {finding["health"] for finding in found} <= {"ok", "note"}
    assert {"python", "disk", "memory", "slurm", "packages", "accelerators", "bf16"} <= {
        each["about"] for each in found
    }
    assert {f"extra {name}" for name in EXTRAS} <= {finding["about"] for finding in found}
    assert len(said.splitlines()) == len(found), "a line each"


def test_what_is_missing_or_broken_is_told_and_nothing_falls_over(tmp_path: Path) -> None:
    needs = [need for need in packages.wanted() if need.extra]
    modules = sorted({need.module.split(".")[0] for need in needs})
    code, said, _ = examined(tmp_path, missing=["torch", *modules], broken=["safetensors", "wandb"])
    assert code == 2, said
    for name in {need.extra for need in needs}:
        assert f"not there, it would bring {EXTRAS[name]}: pip install 'bloomery[{name}]'" in said
    assert "torch is not installed: pip install 'torch<2.12,>=2.11'" in said
    assert "cannot be imported (ImportError: safetensors: undefined symbol): reinstall it" in said


def test_each_extra_has_a_line_of_its_own() -> None:
    needs = packages.wanted()
    extras = {need.module: need.extra for need in needs if need.extra}
    assert set(extras.values()) <= set(EXTRAS), "of the installed version"
    assert len(extras) > 5
    for module, extra in extras.items():
        probed = {need.module: {"error": None, "missing": False} for need in needs}
        probed[module] = {"error": "ImportError: no symbol", "missing": False}
        for name, brings in EXTRAS.items():
            line = packages.of_extra(name, brings, [need for need in needs if need.extra == name], probed)
            assert (line.health is Health.note) == (name == extra)
            assert ("cannot be imported (ImportError: no symbol)" in line.text) == (name == extra)


def test_a_library_that_crashes_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "crashes.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = packages.probe(["json", "crashes", "csv"])
    assert found["json"]["error"] is None
    assert "the interpreter ended with -6" in found["crashes"]["error"]


def test_versions_that_do_not_bear_each_other_are_told() -> None:
    torch = Wanted(requirement=Requirement("torch>=99"), extra="")
    (told,) = [each for each in packages.findings([torch], {"torch": {"error": None}}) if each.health is Health.bad]
    assert told.text.startswith("torch is 2.")
    assert told.remedy == "pip install 'torch>=99'"
    for fault in KNOWN_FAULTS:
        assert not Requirement(f"{fault.package}{fault.versions}").specifier.contains(
            packages._version(fault.package) or ""
        )


def _device(free_gib: int = 79) -> dict[str, Any]:
    return {"name": "H100", "memory_bytes": 80 << 30, "free_bytes": free_gib << 30}


@pytest.mark.parametrize(
    ("sees", "driver", "told"),
    [
        ({"devices": []}, False, "none: everything runs on the CPU"),
        ({"devices": []}, True, "there is a driver, and torch (for CUDA 13.0) sees no device"),
        ({"devices": [_device()] * 8}, True, "8 of H100"),
        ({"devices": [_device(free_gib=9)]}, True, "of accelerator 0 are in use"),
        ({"devices": [_device()], "nccl": None}, True, "no collectives"),
    ],
)
def test_accelerators(sees: dict[str, Any], driver: bool, told: str, tmp_path: Path) -> None:
    if driver:
        (tmp_path / "version").touch()
    known = {"cuda": "13.0", "nccl": "2.28.9", "gloo": True, "bf16": True, "flash": True, **sees}
    lines = [each.line(colour=False) for each in machine.accelerators(known, driver=tmp_path / "version")]
    assert any(told in line for line in lines), lines


def _well(node: str, **facts: Any) -> Measured:
    known: dict[str, Any] = {
        "seconds_computing": 0.1, "repeats": True, "clock": 1000.0, "memory_bytes": 8 << 30, "disk_bytes": 8 << 30,
        "seconds_inside": 0.1, "seconds_between": 0.2, "versions": {"torch": "2.11.0", "code": "abc"},
    }  # fmt: skip
    return Measured(node=node, **{**known, **facts})


@pytest.mark.parametrize(
    ("facts", "bad", "why"),
    [
        ({"repeats": False}, True, "does not compute the same product twice"),
        ({"clock": 1060.0}, False, "has a clock that is +60 s off"),
        ({"memory_bytes": 1 << 20}, True, "has 1 MiB of memory left"),
        ({"disk_bytes": 1 << 20}, True, "has 1 MiB of disk for temporary files left"),
        ({"versions": {"torch": "2.10.0", "code": "abc"}}, True, "has torch 2.10.0, the others 2.11.0"),
        ({"seconds_computing": 0.5}, False, "computes 0.5 s, the median is 0.1 s"),
        ({"seconds_between": 0.9}, False, "takes for an all-reduce with its neighbours 0.9 s, the median is 0.2 s"),
        ({"seconds_inside": 0.9}, False, "takes for an all-reduce among its own ranks 0.9 s, the median is 0.1 s"),
    ],
)
def test_a_node_that_is_not_as_the_others_is_named(facts: dict[str, Any], bad: bool, why: str) -> None:
    measured = [_well("n0"), _well("n1"), _well("n2", **facts), _well("n3")]
    (found,) = suspects(measured)
    assert (found.node, found.bad, found.why) == ("n2", bad, why)


def test_noise_accuses_nobody_and_of_two_nobody_can_tell() -> None:
    assert suspects([_well(f"n{index}", seconds_computing=0.1 + 0.02 * index) for index in range(8)]) == []
    assert suspects([_well("n0"), _well("n1", seconds_computing=5.0)]) == []
    other = replace(_well("n1"), versions={"torch": "2.10.0", "code": "abc"})
    assert [found.node for found in suspects([_well("n0"), other])] == ["n0", "n1"]


@pytest.mark.distributed
@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
def test_nodes_are_measured(nodes: int) -> None:
    def work() -> list[Measured]:
        os.environ["SLURMD_NODENAME"] = f"n{dist.get_rank() % nodes}"
        return measure(torch.device("cpu"))

    found = run_world(work, max(nodes, 2))
    assert all(each == found[0] for each in found), "everybody hears the same"
    assert [each.node for each in found[0]] == [f"n{rank % nodes}" for rank in range(max(nodes, 2))]
    assert all(each.repeats for each in found[0])
    assert all((each.seconds_inside is not None) == (nodes == 1) for each in found[0])
    assert all((each.seconds_between is not None) == (nodes > 1) for each in found[0])
    assert not any(suspect.bad for suspect in suspects(found[0]))


@pytest.mark.distributed
def test_a_bad_node_ends_the_start_and_is_blamed(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv(BLAME_VARIABLE, str(tmp_path / "blame.jsonl"))
    config = configuration(tmp_path, store)
    with monkeypatch.context() as patched:
        patched.setattr("launcher.doctor.preflight.memory_available", lambda: 1 << 20)
        ran("train", config, ranks=2, code=1)
    outcome = outcome_of(tmp_path)
    assert "BadNode: preflight: " in outcome.message
    assert "has 1 MiB of memory left" in outcome.message
    (blamed,) = JsonLines(tmp_path / "blame.jsonl")
    assert blamed["kind"] == "bad"
    ran("train", config, "watchdog.preflight=false", ranks=2)
    assert len(records(tmp_path)) == 12


def test_the_nodes_of_a_job_are_shown(tmp_path: Path) -> None:
    said = ran("doctor", "--job", ranks=2)
    assert "ok    " in said
    assert "2 ranks, computing" in said


def test_a_line() -> None:
    finding = Finding(about="disk", text="1 GiB free", health=Health.bad, remedy="make room")
    assert finding.line(colour=False) == "BAD   disk          1 GiB free: make room"
    assert finding.line(colour=True).startswith("\x1b[31;1mBAD")
