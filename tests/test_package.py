"""The package as an index, an installer and a type checker see it: requirements, pins, files, links."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PACKAGES = ("eua", "fused_energy")
# Imported if they are installed, and explained if not.
OPTIONAL = {"bitsandbytes", "deepspeed", "rouge_score", "scipy", "triton", "vllm"}
EXTRAS = {"serve": "eua/serving"}  # extra → the only folder that imports its packages
IMPORTED_AS = {"yaml": "pyyaml"}
COMES_WITH = {"pyarrow": "datasets"}  # imported package → the requirement that installs it


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Name → lowest version of requirements, which must have the form ``name>=version``."""
    parsed = [re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in requirements]
    assert all(parsed), requirements
    return {name_of(match[1]): match[2] for match in parsed}


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {name_of(line): line.partition("==")[2] for line in lines}


def imports(folder: str) -> set[str]:
    """Distributions that the modules in a folder import, anywhere in their code."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, *PACKAGES, *OPTIONAL}
    return {name_of(IMPORTED_AS.get(name, name)) for name in found}


REQUIRED = lower_bounds(PROJECT["dependencies"])
EXTRA = {extra: lower_bounds(PROJECT["optional-dependencies"][extra]) for extra in EXTRAS}


def test_what_is_imported_is_required():
    extras = {name for bounds in EXTRA.values() for name in bounds}
    assert REQUIRED.keys() >= set(COMES_WITH.values())
    assert set().union(*map(imports, PACKAGES)) - extras - COMES_WITH.keys() == REQUIRED.keys()


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_one_folder_imports_is_an_extra(extra):
    assert imports(EXTRAS[extra]) - REQUIRED.keys() == EXTRA[extra].keys()


def test_the_lowest_versions_that_are_tested_are_the_ones_required():
    pinned = pins("constraints-lowest.txt")
    for bounds in (REQUIRED, *EXTRA.values()):
        for name, version in bounds.items():
            assert re.sub(r"(\.0)+$", "", pinned[name]) == re.sub(r"(\.0)+$", "", version), name


def test_everything_that_is_required_is_pinned():
    wanted = {name_of(r) for rs in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()] for r in rs}
    assert wanted - {"eua"} <= pins("constraints.txt").keys()


def test_both_packages_say_that_they_are_typed():
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()
        assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"][package]


def test_the_versions_agree():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == PROJECT["version"]
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_links_of_the_readme_work_on_a_package_index():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)", readme) + re.findall(r"(?:src|href)=[\"']([^\"']+)", readme)
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_links_of_the_readme_to_this_repository_lead_to_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = re.findall(
        r"https://(?:github|raw\.githubusercontent)\.com/eua-unlearning/eua/(?:blob/)?main/([^)#\s\"']+)", readme
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []
