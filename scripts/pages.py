"""Pages to read, by nbconvert, from notebooks as they are (nothing is run) and from Markdown files.

    python scripts/pages.py FOLDER FILE…     README.md becomes FOLDER/index.html, X.ipynb and X.md FOLDER/X.html

A page needs no network. Its figures lie in it, and its formulas are MathML with a font of 66 kB in the page: where
the system has no font for formulas, browsers draw small sums and roots with gaps. MathJax as a file would be 2 MB.
"""

import base64
import html
import mimetypes
import re
import sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

HERE = Path(__file__).resolve().parent
CODE_OR_FORMULA = re.compile(r"```.*?```|`[^`\n]*`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL)
PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")
FUNCTION = re.compile(r"<mi>(exp|ln|log|cos|max|min)</mi>(?!<mo stretchy=\"false\">&#x00028;)")


def mathml(found: re.Match[str]) -> str:
    """A formula in Markdown as an element of HTML; code as it is."""
    formula = found["block"] or found["inline"]
    if formula is None:
        return found[0]
    element = convert(formula.strip(), display="block" if found["block"] else "inline")
    return FUNCTION.sub(r'<mo lspace="0.15em" rspace="0.15em">\1</mo>', element)


def encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def page_of(file: Path) -> str:
    """The name of the page that a file becomes."""
    return "index.html" if file.name == "README.md" else f"{file.stem}.html"


def linked(text: str, folder: Path, pages: dict[Path, str]) -> str:
    """Markdown that holds its pictures, and whose links lead to the other pages; a link to a file that has none
    becomes its words."""

    def picture(found: re.Match[str]) -> str:
        file = folder / found[2]
        kind = mimetypes.guess_type(file.name)[0]
        return f'<img src="data:{kind};base64,{encoded(file)}" alt="{html.escape(found[1])}">'

    def target(link: re.Match[str]) -> str:
        page = pages.get((folder / link[2]).resolve())
        return f"[{link[1]}]({page}{link[3] or ''})" if page else link[1]

    return LINK.sub(target, PICTURE.sub(picture, text))


def make_page(file: Path, pages: dict[Path, str], titles: list[tuple[str, str]]) -> str:
    """The HTML of a notebook or of a Markdown file."""
    if file.suffix == ".ipynb":
        notebook = nbformat.read(file, as_version=4)
    else:
        text = nbformat.v4.new_markdown_cell(file.read_text(encoding="utf-8"))
        notebook = nbformat.v4.new_notebook(cells=[text])
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = CODE_OR_FORMULA.sub(mathml, linked(cell.source, file.parent, pages))
        for output in cell.get("outputs", []):
            shown = output.get("data", {})
            if "text/markdown" in shown:
                shown["text/markdown"] = CODE_OR_FORMULA.sub(mathml, shown["text/markdown"])
    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(HERE)])
    resources = {
        "metadata": {"name": file.stem},
        "formulas": encoded(HERE / "page" / "formulas.woff2"),
        "pages": titles,
    }
    return exporter.from_notebook_node(notebook, resources)[0]


def main(folder: Path, files: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pages = {file.resolve(): page_of(file) for file in files}
    titles = [
        (name, "Overview" if name == "index.html" else Path(name).stem.replace("_", " "))
        for name in pages.values()
    ]
    for file, name in zip(files, pages.values(), strict=True):
        (folder / name).write_text(make_page(file.resolve(), pages, titles), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
