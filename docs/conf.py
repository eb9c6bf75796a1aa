"""Configuration of the documentation site: Sphinx with MyST and the theme furo. `make docs` builds it."""

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent / "src"), str(DOCS.parent / "scripts"), str(DOCS / "_extensions")]

import inbatch  # noqa: E402

for name in inbatch.__all__:  # autodoc lists what a module holds: import what is imported lazily
    setattr(inbatch, name, getattr(inbatch, name))

project = "inbatch"
author = "inbatch contributors"
copyright = "inbatch contributors"
release = version = installed_version("inbatch")

extensions = [
    "myst_nb",  # MyST, and the tutorials' code is executed
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "cli_reference",
    "docstrings",
    "mathml",
    "repository_links",
]
exclude_patterns = ["_build", "_extensions"]
html_theme = "furo"
html_title = f"inbatch {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4

# Every build executes the tutorials; a cell that fails ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 1200  # seconds of a cell: one takes a minute on a free core, and minutes beside other work
nb_execution_in_temp = True
nb_merge_streams = True
os.environ.setdefault("INBATCH_CACHE", "off")

default_role = "code"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
