"""Configuration of Sphinx for the documentation site; ``make docs`` builds it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

import mdsens

project = "mdsens"
author = "the mdsens developers"
project_copyright = "the mdsens developers"
version = release = mdsens.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # mathematics without a network
    "generated_pages",
]
exclude_patterns = ["_extensions", "README.md"]
html_theme = "furo"
html_title = "mdsens"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

# Every reference inside the site leads somewhere, or the build fails.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!mdsens\b).*")]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
# The notebooks come with the outputs of `make notebooks`: nothing is run twice.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# what they stand for has six lines
autodoc_type_aliases = {
    "ArrayLike": "numpy.typing.ArrayLike",
    "Bounds": "Mapping[str, tuple[float, float]]",
}
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp, .go"
