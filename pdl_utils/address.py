"""The collection's public address: `make address REPOSITORY=owner/name` writes it wherever it belongs, with badges
that open the notebooks in Colab. Until then no badge is shown, and nothing points anywhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat

from pdl_utils.settings import REPOSITORY, save_text

MARKERS = ("<!-- badges -->", "<!-- end of badges -->")  # in README.md
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
LINE = re.compile(r'^REPOSITORY = ".*?"', re.MULTILINE)  # the address in CELL

# The first code cell of every notebook. Colab has the dependencies but two, and must keep its own Jupyter:
# --no-deps. A package installed while the kernel runs is found through addsitedir.
CELL = """\
# In Google Colab this fetches the collection and installs it. Anywhere else it does nothing.
import sys

REPOSITORY = ""  # owner/name on GitHub, written by `make address`
if "google.colab" in sys.modules:
    import os
    import site
    import subprocess
    from pathlib import Path

    fetch = f"git clone --depth 1 https://github.com/{REPOSITORY} /content/pdl"
    install = ["pip install -q torch-geometric lightly", "pip install -q --no-deps -e /content/pdl"]
    for command in install if Path("/content/pdl").is_dir() else [fetch, *install]:
        if not REPOSITORY or subprocess.run(command.split()).returncode:
            sys.exit(f"No network, or REPOSITORY is not the collection's address; this failed: {command}")
    site.addsitedir("/content/pdl")
    os.chdir("/content/pdl/notebooks")"""


def set_address(repository: str, root: Path = REPOSITORY) -> None:
    """Write `repository` (owner/name on GitHub) into pyproject.toml, README.md and the notebooks under `root`.

    Raises:
        ValueError: it is no such name, or a file has no place for it; then nothing is written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+", repository):
        raise ValueError(f"REPOSITORY={repository!r}: give the owner and the name on GitHub, as owner/name")
    pyproject, readme = root / "pyproject.toml", root / "README.md"
    urls = f'[project.urls]\nRepository = "https://github.com/{repository}"\n\n'
    rest = re.sub(r"\[project\.urls\]\n(?:[^\[\n].*\n)*\n*", "", pyproject.read_text(encoding="utf-8"))
    written = {
        pyproject: rest.replace("[project.optional-dependencies]", urls + "[project.optional-dependencies]", 1)
    }
    badges = []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
        badges.append(f"{path.stem[0]} {BADGE}({link})")
        written[path] = _with_address(path, repository, f"{BADGE}({link})")
    before, opening, after = readme.read_text(encoding="utf-8").partition(MARKERS[0])
    _, closing, after = after.partition(MARKERS[1])
    if not (opening and closing and urls in written[pyproject]):
        raise ValueError("README.md has lost its markers for badges, or pyproject.toml its optional dependencies")
    written[readme] = f"{before}{opening}\n{' · '.join(badges)}\n{closing}{after}"
    for path, content in written.items():
        save_text(content, path)


def _with_address(path: Path, repository: str, badge: str) -> str:
    """The notebook with the badge under its title, and the address in its first code cell."""
    notebook = nbformat.read(path, as_version=4)
    title, code = notebook.cells[0], next(c for c in notebook.cells if c.cell_type == "code")
    if LINE.sub("", code.source) != LINE.sub("", CELL):
        raise ValueError(f"{path.name}: its first code cell is not pdl_utils.address.CELL")
    code.source = LINE.sub(f'REPOSITORY = "{repository}"', CELL)
    heading, _, text = title.source.partition("\n")
    text = re.sub(rf"^{re.escape(BADGE)}.*$", "", text, flags=re.MULTILINE)
    title.source = f"{heading}\n\n{badge}\n\n{text.strip()}"
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    try:
        set_address(" ".join(sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
