"""README's table of results: this repository beside the papers and the best public figures, never by hand."""

import json
import re

import nbformat
import pytest

from pdl_utils.results import MARKERS, published_figures, readme_table
from pdl_utils.settings import REPOSITORY

RESULTS = json.loads((REPOSITORY / "figures" / "results.json").read_text(encoding="utf-8"))
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def table_in(readme):
    return readme.partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip()


def test_readme_shows_what_the_two_lists_say():
    assert table_in(README) == readme_table(RESULTS).strip()


@pytest.mark.parametrize("notebook", RESULTS)
def test_a_result_is_the_number_that_its_notebook_shows(notebook):
    cells = nbformat.read(REPOSITORY / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    shown = "\n".join(o.get("text") or o.get("data", {}).get("text/markdown", "") for o in outputs).splitlines()
    for name, entry in RESULTS[notebook].items():
        heads = f"| {name} |", f"| {name.removesuffix(', test micro-F1')} |"
        rows = [line for line in shown if line.startswith(heads)]
        assert any(f"{entry['mean']:.3f}" in row for row in rows), (name, entry["mean"], rows)


def test_a_published_figure_says_what_it_is_and_where_it_stands():
    figures = published_figures()
    assert len({json.dumps(f, sort_keys=True) for f in figures}) == len(figures)
    for figure in figures:
        assert set(figure) == {"notebook", "rows", "column", "figure", "measured", "source", "address"}
        assert figure["column"] in ("papers", "public")
        assert re.match(r"0\.\d{3}( ± 0\.\d{3})? ?\S", figure["figure"])
        assert "(" in figure["figure"], f"{figure['figure']}: say in a few words what it was measured on"
        assert figure["address"].startswith("https://")
        assert figure["measured"]
        assert figure["source"]


def entry(mean, provenance="PPI: official files"):
    return {"mean": mean, "std": 0.0, "n": 1, "unit": "share", "provenance": provenance, "run": "full"}


def figure(**changes):
    theirs = {"notebook": "2_graphs", "rows": ["GAT"], "column": "papers", "figure": "0.973 (PPI)"}
    return theirs | {"measured": "GAT", "source": "a paper", "address": "https://a.paper"} | changes


def test_a_row_stands_beside_the_papers_and_the_best():
    ours = {"2_graphs": {"rank 16": entry(0.25), "rank 2": entry(0.5), "GAT": entry(0.75)}}
    table = readme_table(ours, [figure(), figure(column="public", figure="0.997 (PPI)")])
    assert "| GAT | 0.750 | 0.973 (PPI) <sup>a</sup> | 0.997 (PPI) <sup>b</sup> | share |" in table
    assert "| rank 2 | 0.500 | – | – | share |\n| rank 16 | 0.250 | – | – | share |" in table
    assert "<sup>a</sup> GAT ([a paper](https://a.paper))" in table
    assert "not comparable" not in table
    stand_in = {"2_graphs": {"GAT": entry(0.75, "PPI: stand-in: seeded graphs")}}
    assert "**not comparable**" in readme_table(stand_in, [figure()])
    assert "not comparable" not in readme_table(stand_in, [])


def test_every_change_to_a_number_or_a_list_shows():
    published = published_figures()
    tables = {readme_table(RESULTS)}
    for notebook, entries in RESULTS.items():
        name = next(iter(entries))
        changed = RESULTS | {notebook: entries | {name: entries[name] | {"mean": 0.123}}}
        tables.add(readme_table(changed))
    for number, theirs in enumerate(published):
        tables.add(readme_table(RESULTS, published[:number] + published[number + 1 :]))
        tables.add(
            readme_table(
                RESULTS, [*published[:number], theirs | {"figure": "0.999 (?)"}, *published[number + 1 :]]
            )
        )
    assert len(tables) == 1 + len(RESULTS) + 2 * len(published)


@pytest.mark.parametrize(
    ("published", "complaint"),
    [
        ([figure(rows=["GAT", "GATv3"])], r"\['GATv3'\], which 2_graphs has not recorded"),
        ([figure(notebook="4_more")], r"\['4_more'\], which have no results"),
        ([figure(), figure(figure="0.5 (PPI)")], "two figures for 'GAT', papers"),
    ],
)
def test_a_figure_beside_nothing_is_an_error(published, complaint):
    with pytest.raises(ValueError, match=complaint):
        readme_table({"2_graphs": {"GAT": entry(0.75)}}, published)
