"""An executed notebook as an HTML page whose formulas need no network: LaTeX becomes MathML, which browsers know.

python scripts/to_html.py NOTEBOOK.ipynb PAGE.html
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

from pdl_utils.settings import save_text

FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL)
# nbconvert sets code inside Markdown outputs, which show_source makes, in the font of prose.
STYLE = "<style>.jp-RenderedMarkdown pre { font-family: var(--jp-code-font-family) !important }</style>"


def mathml(formula: re.Match[str]) -> str:
    """A `$…$` or `$$…$$` of a Markdown cell as an element of HTML."""
    block = formula["block"]
    return convert((block or formula["inline"]).strip(), display="block" if block else "inline")


def page(notebook: nbformat.NotebookNode) -> str:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(mathml, cell.source)
    html, _ = HTMLExporter().from_notebook_node(notebook)
    return html.replace("</head>", f"{STYLE}</head>", 1)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    save_text(page(nbformat.read(source, as_version=4)), Path(target))
