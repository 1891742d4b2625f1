"""Every number that a run writes stands in the one table with its unit; what is known of a machine by its name."""

from pathlib import Path

import pytest

from launcher.metrics import METRICS, flat, metric, nested
from launcher.plan.hardware import of_device
from launcher.run_directory import RunDirectory
from tests.launcher.test_tasks import task
from tests.launcher.tiny import configuration, ran

PEAK = """
name: an abacus
peak_flops: {fp32: 1e12}
memory_bytes: 1e9
reserved_bytes: 1
memory_bytes_per_second: 1e9
node_bytes_per_second: 1e9
network_bytes_per_second: 1e9
host_bytes_per_second: 1e9
node_latency_seconds: 1e-4
network_latency_seconds: 1e-4
dollars_per_hour: 1
efficiency: {matrices: 0.5, attention: 0.5, memory: 0.5, links: 0.5}
"""


def test_the_table_of_metrics_is_what_runs_write(tmp_path: Path, store: Path) -> None:
    hardware = tmp_path / "abacus.yaml"
    hardware.write_text(PEAK)
    ask = {"name": "choose", "kind": "multiple_choice", "choices": ["iron", "ore"]}
    chosen = task(tmp_path, [{"text": "air", "label": "ore"}], **ask)
    moe = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 48, "moe": {"experts": 4}}
    config = configuration(
        tmp_path,
        store,
        model=moe,
        train={"steps": 2, "z_loss": 1e-4},
        optimizer={"schedule": {"warmup_steps": 1}},
        evaluate={"every_steps": 2, "batches": 1, "tasks": {"files": [str(chosen)]}},
        tracking={"hardware": str(hardware), "wandb": {"mode": "disabled"}},
    )
    ran("train", config)
    first, last = RunDirectory(tmp_path / "run").metrics
    names = {*flat(first), *flat(last)}
    assert not [name for name in sorted(names) if metric(name) is None], "not in launcher.metrics"
    written = {name if name in METRICS else f"{name.partition('.')[0]}.*" for name in names}
    assert written == set(METRICS)
    for name, row in METRICS.items():
        assert row.unit, name
        assert row.meaning, name
    assert nested(flat(last)) == last
    assert set(last["tokens_by_source"]) == set(last["loss_by_source"]) == {"code", "prose"}
    assert set(last["validation_loss_by_source"]) == {"code", "prose"}
    assert last["busiest_expert"] == max(last["router_load"].values())
    assert set(last["tasks"]) == {"choose.accuracy", "choose.accuracy_by_length"}
    assert list(last["router_load"]) == ["1", "2"]
    assert last["peak_flops"] == 1e12
    assert 0 < last["mfu_causal"] < last["mfu_full"]


@pytest.mark.parametrize(
    ("device", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM5 80 GB"),
        ("NVIDIA H200", "NVIDIA H200 SXM 141 GB"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM4 80 GB"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_accelerators_are_known_by_their_own_names(device: str, known: str | None) -> None:
    found = of_device(device)
    assert (found.name if found else None) == known


def test_hardware_that_does_not_exist_is_a_mistake(tmp_path: Path, store: Path) -> None:
    said = ran("train", configuration(tmp_path, store, tracking={"hardware": "abacus"}), code=2)
    assert "tracking.hardware is 'abacus': expected a name under configs/hardware" in said, said
