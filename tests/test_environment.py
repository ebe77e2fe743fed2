"""One place for dependencies: what conda, make, pre-commit and CI install agrees with it."""

import re
import tomllib
from importlib.metadata import version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import medlib
from medlib.paths import PROJECT

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
ENVIRONMENT = yaml.safe_load((PROJECT / "environment.yml").read_text())
DEVELOPMENT = PYPROJECT["project"]["optional-dependencies"]["dev"]
DECLARED = [Requirement(line) for line in [*PYPROJECT["project"]["dependencies"], *DEVELOPMENT]]


def text(name: str) -> str:
    """A file at the project's root."""
    return (PROJECT / name).read_text(encoding="utf-8")


def constraints() -> dict[str, str]:
    """The tested version of each package."""
    lines = [line for line in text("constraints.txt").splitlines() if line and not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines), "a package stands twice in constraints.txt"
    return {canonicalize_name(name): pin for name, pin in pinned.items()}


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_each_dependency_has_a_tested_version_that_is_allowed(requirement: Requirement) -> None:
    pin = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin)
    assert requirement.specifier.contains(version(requirement.name)), "what is installed here is not what is declared"


def test_each_dependency_says_why_it_is_there() -> None:
    lines = [line for line in text("pyproject.toml").splitlines() if re.match(r'    "[\w.-]+[><=~]', line)]
    assert len(lines) == len(DECLARED)
    assert [line for line in lines if not re.search(r'",\s+# \w', line)] == []


def test_torch_and_python_are_as_promised() -> None:
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert next(str(requirement) for requirement in DECLARED if requirement.name == "torch") == "torch>=2.8"
    assert constraints()["torch"] == "2.13.0"
    assert "torchvision" not in constraints()


def test_conda_gets_the_same() -> None:
    python = next(Requirement(line) for line in ENVIRONMENT["dependencies"] if str(line).startswith("python"))
    wanted = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert python.specifier.contains("3.11") and wanted.contains("3.11")
    assert not python.specifier.contains("3.10") and not wanted.contains("3.10")
    pip = next(line["pip"] for line in ENVIRONMENT["dependencies"] if isinstance(line, dict))
    assert pip == ["-c constraints.txt", "-e .[dev]"], "list packages in pyproject.toml and versions in constraints.txt"


def test_make_installs_torch_first_and_everything_under_the_constraints() -> None:
    installs = [line for line in text("Makefile").splitlines() if "pip install" in line]
    assert "constraints.txt" in installs[0] and "torch==" in installs[0]
    assert "-c constraints.txt -e '.[dev]'" in installs[1] and len(installs) == 2


def test_pre_commit_runs_the_tested_versions_and_the_same_tidying_as_make() -> None:
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    for hook in hooks:
        for requirement in map(Requirement, hook["additional_dependencies"]):
            assert str(requirement.specifier) == f"=={constraints()[requirement.name]}"
    tidy = next(hook["entry"] for hook in hooks if hook["id"] == "nbstripout")
    assert " ".join(tidy.split()) in " ".join(text("Makefile").replace("\\\n", " ").split())


def test_ci_calls_make_test_and_github_calls_the_same() -> None:
    assert text(".ci/run").splitlines()[-1] == "make test"
    steps = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]


def test_the_citation_has_the_version() -> None:
    assert str(yaml.safe_load(text("CITATION.cff"))["version"]) == medlib.__version__
