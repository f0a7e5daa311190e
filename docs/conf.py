"""Sphinx's settings: Markdown pages, and references that `reference.py` writes before each build."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import reference  # noqa: E402

project = "graphwright"
copyright = "the authors of graphwright"
extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["*.png"]
html_theme = "alabaster"
html_theme_options = {"description": "A compiler whose passes say what they do to the numbers", "page_width": "1100px"}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}

reference.write(Path(__file__).parent / "reference")
