"""Settings of the documentation site, which ``make docs`` builds from this folder into ``build/docs``."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib.metadata import version as installed_version
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

project = "eua"
author = "the eua authors"
version = release = installed_version("eua")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
highlight_language = "text"  # of blocks that name no language
html_theme = "furo"
html_title = f"eua {release}"
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/demo/test_notebook.py executes the notebook; the site shows it as it is in git

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns"]  # prose, in which a colon does not end a type
napoleon_use_ivar = True  # attributes in a docstring must not collide with fields of the same name
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True


class ConfigFields(Directive):
    """A table of the fields that EUAConfig adds to TrainingArguments, or whose default it changes, with their help."""

    def run(self) -> list[nodes.Node]:
        from eua import EUAConfig

        own = EUAConfig.__dict__["__annotations__"]
        lines = ["| field | default | meaning |", "|---|---|---|"]
        for field in dataclasses.fields(EUAConfig):
            if field.name in own:
                help_text = field.metadata.get("help", "").replace("|", "\\|")
                lines.append(f"| `{field.name}` | {_default(field)} | {help_text} |")
        container = nodes.container()
        self.state.nested_parse(StringList(lines, "EUAConfig"), self.content_offset, container)
        return container.children


class MethodsTable(Directive):
    """A table of the unlearning methods, with the settings that were published for each."""

    def run(self) -> list[nodes.Node]:
        from eua.methods.table import METHODS

        lines = ["| `method` | name | published in | settings | reads, beyond energy and NLL |", "|---|---|---|---|---|"]
        for name, method in METHODS.items():
            published = {"retain_loss": method.retain_loss} if method.retain_loss else {}
            settings = ", ".join(f"`{key}={value!r}`" for key, value in {**method.settings, **published}.items())
            needs = [
                *(
                    {"boundary": ["boundaries, computed once"], "nll": ["likelihoods before unlearning, computed once"]}.get(
                        method.reference or "", []
                    )
                ),
                *({"idk": ["phrases of not knowing"], "own": ["other answers of the rows"]}.get(method.alternatives or "", [])),
                *(["mean of the logits"] if "mean logit" in method.needs else []),
                *(["largest logit"] if name == "pdu" else []),
                *(["output of a block"] if "inner" in method.needs else []),
                *(["`ref_model`, at every step"] if method.needs_model or method.retain_loss == "hidden" else []),
            ]
            lines.append(f"| `{name}` | {method.title} | {method.source} | {settings} | {', '.join(needs)} |")
        container = nodes.container()
        self.state.nested_parse(StringList(lines, "METHODS"), self.content_offset, container)
        return container.children


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    return "depends on the device"


class CommandHelp(Directive):
    """What a command prints with ``--help``, as this version prints it."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "eua", *self.arguments[0].split()]
        environment = os.environ | {"COLUMNS": "86", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise self.error(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return [nodes.literal_block(done.stdout, done.stdout, language="text")]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("config-fields", ConfigFields)
    app.add_directive("command-help", CommandHelp)
    app.add_directive("methods-table", MethodsTable)
    return {"parallel_read_safe": True}
