"""A package of the user's own, made from the blocks of docs/plugins.md, without touching this repository.

Nothing is imported in this process: every command is forked from it, and imports what its configuration names.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher import plugins
from launcher.places import find_checkpoint
from launcher.verify.world import run_world
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError
from tests.launcher.test_train import records
from tests.launcher.tiny import ROOT, configuration, ran, run, texts

pytestmark = pytest.mark.distributed

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(), re.DOTALL)
OWN: dict[str, Any] = {
    "optimizer": {"name": "lion", "learning_rate": 2e-3, "options": {"betas": [0.9, 0.98]}},
    "train": {"steps": 8, "objective": "focal"},
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that Python finds, with the documented module in it."""
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "my_recipes.py").write_text("\n\n".join(BLOCKS))
    monkeypatch.syspath_prepend(directory)
    return directory


def states(path: Path) -> set[str]:
    def read() -> set[str]:
        return {name.partition(".")[0] for name in StoredTensors(find_checkpoint(str(path)).path).shapes}

    return run_world(read, 1)[0]


def test_an_optimizer_an_objective_and_samples_of_ones_own_train_in_every_layout(
    tmp_path: Path, store: Path, package: Path
) -> None:
    found = []
    layouts: list[tuple[str, int, dict[str, Any]]] = [("one", 1, {"zero_stage": 0}), ("two", 2, {"tensor": 2})]
    for name, ranks, layout in layouts:
        directory = tmp_path / name
        directory.mkdir()
        config = configuration(directory, store, plugins=["my_recipes"], parallel=layout, **OWN)
        said = ran("train", config, ranks=ranks)
        found.append([record["loss"] for record in records(directory)])
        assert states(directory / "run") == {"weight", "momentum"}
    assert found[1] == pytest.approx(found[0], rel=2e-3)
    assert found[0][-1] < found[0][0] - 0.2
    codes, said = run("train", tmp_path / "two/config.yaml", "train.steps=10", f"run.dir={tmp_path}/more",
                      f"checkpoint.load={tmp_path / 'two/run'}@4", "parallel.tensor=1", ranks=2)  # fmt: skip
    assert codes == [0, 0], said


def test_a_family_of_ones_own_trains_is_proven_and_exported(tmp_path: Path, store: Path, package: Path) -> None:
    model = {"family": "granite", "query_pre_attention_scalar": 64}
    config = configuration(tmp_path, store, plugins=["my_recipes"], model=model, parallel={"tensor": 2})
    said = ran("train", config, ranks=2)
    said = ran("verify", config, ranks=1)
    said = ran("checkpoint", "export", tmp_path / "run", "--output", tmp_path / "hf")
    assert "logits: ours and those of transformers differ by" in said
    theirs = json.loads((tmp_path / "hf/config.json").read_text())
    assert (theirs["model_type"], theirs["architectures"]) == ("granite", ["GraniteForCausalLM"])
    said = ran("train", config, "plugins=[]", "parallel.tensor=1", f"run.dir={tmp_path / 'without'}", code=2)
    assert "model.family is 'granite': expected one of gpt2, llama," in said


def test_the_code_of_a_plugin_is_the_runs(tmp_path: Path, store: Path, package: Path) -> None:
    config = configuration(tmp_path, store, plugins=["my_recipes"], **OWN)
    said = ran("train", config)
    module = package / "my_recipes.py"
    module.write_text(module.read_text() + "\n# another version\n")
    said = ran("train", config, "train.steps=10", "checkpoint.allow_changes=[train.steps]", code=2)
    assert "changed in plugins/my_recipes.py" in said
    said = ran("train", config, "train.steps=10", "checkpoint.allow_changes=[train.steps, code]")
    assert "the code, in plugins/my_recipes.py" in said


def test_an_installed_package_is_found_by_its_entry_point(tmp_path: Path, store: Path, package: Path) -> None:
    about = package / "my_recipes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-recipes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nown = my_recipes\n")
    config = configuration(tmp_path, store, **{**OWN, "train": {"steps": 3, "objective": "focal"}})
    ran("train", config)
    ran("evaluate", tmp_path / "run")


def test_a_filter_of_ones_own_drops_documents_and_is_counted(tmp_path: Path, package: Path) -> None:
    with (tmp_path / "web.jsonl").open("w") as file:
        for number, text in enumerate(texts("web", 40)):
            own = f"lorem {text}" if number % 4 == 0 else text
            file.write(json.dumps({"id": str(number), "text": own}) + "\n")
    data = {
        "sources": [{"name": "web", "path": str(tmp_path / "web.jsonl")}],
        "store": str(tmp_path / "store"),
        "tokenizer": {"vocabulary_size": 384},
        "stages": {"filters": {"own": {"without_words": {"words": ["lorem"]}}}},
    }
    config = configuration(tmp_path, tmp_path / "store", data=data, plugins=["my_recipes"])
    said = ran("data", "build", config)
    report = (tmp_path / "store/report.json").read_text()
    assert "own: it says lorem" in report
    said = ran("data", "build", config, "plugins=[]", code=2)
    assert "data.stages.filters.own.without_words" in said
    assert "does `plugins` name the module?" in said


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "plugins: there is no module my_recipes: expected a module that Python finds"),
        ("import nowhere_at_all", "the module my_recipes cannot be imported: No module named 'nowhere_at_all'"),
        ("1 / 0", "the module my_recipes cannot be imported: ZeroDivisionError: division by zero"),
        (
            "from parallel.torch_optimizers import register_optimizer\nregister_optimizer('muon', None, states=())",
            "ValueError: there is an optimizer called muon already",
        ),
    ],
)
def test_a_plugin_that_does_not_load_is_told(tmp_path: Path, package: Path, content: str | None, told: str) -> None:
    (package / "my_recipes.py").unlink()
    if content is not None:
        (package / "my_recipes.py").write_text(content)
    with pytest.raises(UserError) as refused:
        plugins.load(["my_recipes"])
    assert told in str(refused.value)


def test_a_word_that_nobody_registered_is_refused(tmp_path: Path, store: Path, package: Path) -> None:
    config = configuration(tmp_path, store, **OWN)
    said = ran("train", config, code=2)
    assert (
        "optimizer.name is 'lion': expected one of adamw, adamw_8bit, muon, adafactor, or one that a plugin registers"
        in said
    )
