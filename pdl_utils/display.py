"""What a notebook prints: source code beside its formula, and tables, as Markdown that GitHub renders."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from IPython.display import Markdown


def show_source(*objects: Any) -> Markdown:
    """The source of functions, classes or methods as one code block, read from the installed package:
    what is shown is what runs. Docstrings are left out: the prose beside it explains."""
    parts = [without_docstrings(textwrap.dedent(inspect.getsource(obj)).rstrip()) for obj in objects]
    code = "\n\n\n".join(parts)
    return Markdown(f"```python\n{code}\n```")


def without_docstrings(code: str) -> str:
    """Python source without the docstrings of its functions and classes; comments stay."""
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            first, last = text.lineno - 1, text.end_lineno
            lines[first:last] = [None] * (last - first)
            if len(node.body) == 1:  # a body that is a docstring alone still needs a statement
                lines[first] = " " * text.col_offset + "..."
    return "\n".join(line for line in lines if line is not None)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A Markdown table: text on the left, numbers (as they are formatted by the caller) as given."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return Markdown("\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]))
