"""Are the packages there, in the versions that Bloomery wants, and do they bear each other?

Three questions, from the packages' own metadata: does each stand in Bloomery's range; does everything that they want of
each other hold (the rule that `pip check` applies, for what Bloomery needs alone); and can it be imported. The last one
is tried in a process of its own (`launcher.doctor.probe`), so that a library that crashes is a line and not the end.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launcher.doctor.finding import Finding, Health
from launcher.start import repository_environment

MODULES = {
    "fsspec": "fsspec", "lmdb": "lmdb", "megatron-core": "megatron.core", "pyyaml": "yaml",
    "py3langid": "py3langid.langid", "lxml-html-clean": "lxml_html_clean", "scikit-learn": "sklearn",
}  # fmt: skip
"""The module of a package, where it has another name."""
TESTED = {"torch": "2.11.0", "megatron-core": "0.19.2", "deepspeed": "0.19.8"}
"""What computes, as it was tested: the engine stands on parts of DeepSpeed that may change with any release."""
EXTRAS = {
    "bnb": "8-bit AdamW (optimizer.name=adamw_8bit)",
    "eval": "figures of tasks and lm-evaluation-harness (bloomery evaluate --task, --harness)",
    "fast": "another encoder, for the tokenizers that it knows; its gain was not measured here",
    "filters": "filters by language",
    "hf": "the check of logits when weights go to and come from Hugging Face",
    "ray": "data builds over several nodes (data.engine=ray)",
    "tensorboard": "event files beside metrics.jsonl (tracking.tensorboard)",
    "warc": "text from WARC archives",
}
"""What each extra brings."""
_PROBE_SECONDS = 180


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownFault:
    """Versions that were seen to fail, which the packages' own metadata do not tell."""

    package: str
    versions: str
    what: str
    remedy: str


KNOWN_FAULTS = (
    KnownFault(
        package="torch",
        versions="<2.10",
        what="a foreign checkpoint could run code although it was read with weights_only (CVE-2026-24747)",
        remedy="pip install 'torch>=2.11,<2.12'",
    ),
    KnownFault(
        package="megatron-core",
        versions="<0.17",
        what="its HybridModel lacks what every causal model here stands on",
        remedy="pip install 'megatron-core>=0.19.2,<0.20'",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A requirement of Bloomery's."""

    requirement: Requirement
    extra: str
    """Empty for what it cannot do without."""

    @property
    def name(self) -> str:
        """As everybody writes it."""
        return canonicalize_name(self.requirement.name)

    @property
    def module(self) -> str:
        """What to import."""
        return MODULES.get(self.name, self.name.replace("-", "_"))


def wanted() -> list[Wanted]:
    """What Bloomery needs, and what its extras need.

    Raises:
        PackageNotFoundError: it was never installed, its code only lies there.
    """
    found = []
    for text in distribution("bloomery").requires or []:
        requirement = Requirement(text)
        if requirement.name == "bloomery":  # an extra that takes another one in, which has its own line
            continue
        extra = next((name for name in EXTRAS if _only_with(requirement, name)), "")
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if extra or applies:
            found.append(Wanted(requirement=requirement, extra=extra))
    return found


def _only_with(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and not marker.evaluate({"extra": ""}) and marker.evaluate({"extra": extra})


def probe(modules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{module: what came of importing it}; what a crash left untold is that module's failure, and those after it."""
    command = [sys.executable, "-P", "-m", "launcher.doctor.probe", *modules]
    try:
        done = subprocess.run(
            command,
            env=repository_environment(),
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
        output, end = done.stdout, f"the interpreter ended with {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        end = f"no answer within {_PROBE_SECONDS} s"
    told = [json.loads(line) for line in output.splitlines() if line.startswith('{"module"')]
    found = {record["module"]: record for record in told}
    return {name: found.get(name, {"module": name, "error": end, "missing": False}) for name in modules}


def findings(needs: Sequence[Wanted], probed: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """A line for what is wrong with each package, one for all that are well, one for each extra."""
    core = [need for need in needs if not need.extra]
    wrong = [finding for need in core for finding in _of(need, probed[need.module])]
    yield from wrong
    yield from _torn(needs)
    yield from _known_faults()
    well = len(core) - len({finding.about for finding in wrong})
    told = ", ".join(f"{name} {_version(name) or 'missing'}" for name in TESTED)
    yield Finding(about="packages", text=f"{well} of {len(core)} that Bloomery needs are well: {told}")
    yield from (
        Finding(
            about=name,
            text=f"{_version(name)} is in its range, and {version} is what was tested",
            health=Health.note,
            remedy=f"pip install {name}=={version} if numbers or memory surprise you",
        )
        for name, version in TESTED.items()
        if _version(name) not in (None, version) and name not in {finding.about for finding in wrong}
    )
    for extra, brings in EXTRAS.items():
        yield of_extra(extra, brings, [need for need in needs if need.extra == extra], probed)


def _of(need: Wanted, told: Mapping[str, Any]) -> list[Finding]:
    """What is wrong with a package: nothing, or one thing."""
    version, requirement = _version(need.name), need.requirement
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None or told.get("missing"):
        text = f"{need.name} is not installed"
    elif not requirement.specifier.contains(version, prereleases=True):
        text = f"{need.name} is {version}, and Bloomery needs {requirement.specifier}"
    elif told.get("error"):
        text, install = f"{need.name} {version} cannot be imported ({told['error']})", f"reinstall it, {install}"
    else:
        return []
    return [Finding(about=need.name, text=text, health=Health.bad, remedy=install)]


def of_extra(extra: str, brings: str, needs: Sequence[Wanted], probed: Mapping[str, Mapping[str, Any]]) -> Finding:
    """The line of an extra, which needs these packages."""
    wrong = [finding for need in needs for finding in _of(need, probed[need.module])]
    if not wrong:
        return Finding(about=f"extra {extra}", text=f"there: {brings}")
    missing = all(_version(need.name) is None or probed[need.module].get("missing") for need in needs)
    return Finding(
        about=f"extra {extra}",
        text=f"not there, it would bring {brings}" if missing else wrong[0].text,
        health=Health.note,
        remedy=f"pip install 'bloomery[{extra}]'" if missing else wrong[0].remedy,
    )


def _torn(needs: Sequence[Wanted]) -> Iterator[Finding]:
    """Pairs of installed packages of which one wants another version of the other."""
    queue = [need.name for need in needs if _version(need.name) is not None]
    for name in queue:  # it grows
        for text in distribution(name).requires or []:
            other = Requirement(text)
            if other.marker is not None and not other.marker.evaluate({"extra": ""}):
                continue
            version, other_name = _version(other.name), canonicalize_name(other.name)
            if version is None:
                continue
            if not other.specifier.contains(version, prereleases=True):
                yield Finding(
                    about=name,
                    text=f"{name} {_version(name)} wants {other.name}{other.specifier}, and {version} is installed",
                    health=Health.bad,
                    remedy=f"pip install '{other.name}{other.specifier}'",
                )
            if other_name not in queue:
                queue.append(other_name)


def _known_faults() -> Iterator[Finding]:
    for fault in KNOWN_FAULTS:
        version = _version(fault.package)
        if version is not None and Requirement(f"{fault.package}{fault.versions}").specifier.contains(version):
            yield Finding(
                about=fault.package, text=f"with {version} {fault.what}", health=Health.bad, remedy=fault.remedy
            )


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None
