"""docs/results.md and README's table: never by hand, and the numbers that the notebooks show."""

import json
import re

import nbformat
import pytest

from pdl_utils.datasets.sources import Provenance
from pdl_utils.notebook import Run
from pdl_utils.settings import REPOSITORY, Profile
from scripts.make_docs import CHOSEN, load, readme_table, results_page, with_table

RESULTS, PUBLISHED = load("results.json"), load("published.json")


def test_the_pages_show_what_the_two_lists_say():
    assert (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8") == results_page(RESULTS, PUBLISHED)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert readme == with_table(readme, readme_table(RESULTS, PUBLISHED))
    assert len(CHOSEN) <= 10


@pytest.mark.parametrize("notebook", RESULTS)
def test_a_result_is_the_number_that_its_notebook_shows(notebook):
    cells = nbformat.read(REPOSITORY / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    shown = "\n".join(o.get("text") or o.get("data", {}).get("text/markdown", "") for o in outputs).splitlines()
    for name, entry in RESULTS[notebook].items():
        assert set(entry) == {"mean", "std", "n", "unit", "provenance", "run"}, name
        assert entry["run"].startswith("full"), name
        rows = [line for line in shown if line.startswith(f"| {name} |")]
        assert any(f"{entry['mean']:.3f}" in row for row in rows), (name, entry["mean"], rows)


def test_a_notebook_shows_all_that_it_recorded_beside_what_others_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("PDL_FIGURES", str(tmp_path))
    run, theirs = Run("2_graph_attention", Profile("fast", "a test")), PUBLISHED[-1]
    run.notebook = theirs["notebook"]
    run.record(theirs["rows"][0], [0.5, 0.75], "share", Provenance("PPI", "official files"))
    run.record("something new", 0.25, "share", Provenance("PPI", "official files"))
    first, second = run.results().data.splitlines()[2:]
    assert first.startswith(f"| {theirs['rows'][0]} | 0.625 ± 0.177 (n = 2) |")
    assert f" {theirs['figure']} |" in first
    assert second == "| something new | 0.250 | – | – | share |"


def test_a_published_figure_says_what_it_is_and_where_it_stands():
    assert len({json.dumps(f, sort_keys=True) for f in PUBLISHED}) == len(PUBLISHED)
    for figure in PUBLISHED:
        assert set(figure) == {"notebook", "rows", "column", "figure", "measured", "source", "address"}
        assert figure["column"] in ("paper", "public")
        assert re.match(r"0\.\d{3}( ± 0\.\d{3})? ?\S", figure["figure"])
        assert figure["address"].startswith("https://")
        assert figure["measured"]
        assert figure["source"]


def entry(mean, *provenance):
    return {"mean": mean, "std": 0.0, "n": 1, "unit": "share", "provenance": [*provenance], "run": "full"}


def figure(**changes):
    theirs = {"notebook": "2_graphs", "rows": ["GAT"], "column": "paper", "figure": "0.973 (PPI)"}
    return theirs | {"measured": "GAT", "source": "a paper", "address": "https://a.paper"} | changes


def test_a_row_stands_beside_the_paper_and_the_best():
    gat = entry(0.75, "PPI: official; some unknown", "a map: ours")
    ours = {"2_graphs": {"rank 16": entry(0.25), "rank 2": entry(0.5), "GAT": gat}}
    theirs = [figure(), figure(column="public", figure="0.997", measured="g2-MLP")]
    page = results_page(ours, theirs)
    assert "| GAT | 0.750 | 0.973 (PPI) <sup>a</sup> | 0.997 <sup>b</sup> | share |" in page
    assert "| rank 2 | 0.500 | – | – | share |\n| rank 16 | 0.250 | – | – | share |" in page
    assert "- <sup>a</sup> GAT ([a paper](https://a.paper))" in page
    assert "not comparable" not in page
    assert "Ours were made from PPI: official; some unknown · a map: ours." in page
    table = readme_table(ours, theirs, [("2_graphs", "GAT", "attention")])
    assert table.endswith("\n| 2 · attention | 0.750 | 0.973 (PPI) | 0.997 |")
    stand_in = {"2_graphs": {"GAT": entry(0.75, "PPI: stand-in: seeded graphs")}}
    assert "**not comparable**" in results_page(stand_in, theirs)
    assert "0.750 (stand-in)" in readme_table(stand_in, theirs, [("2_graphs", "GAT", "attention")])


@pytest.mark.parametrize(
    ("published", "complaint"),
    [
        ([figure(rows=["GAT", "GATv3"])], "2_graphs has recorded no result 'GATv3'"),
        ([figure(notebook="4_more")], "4_more has recorded no result"),
        ([figure(), figure(figure="0.5")], "two figures for"),
    ],
)
def test_a_figure_beside_nothing_is_an_error(published, complaint):
    with pytest.raises(ValueError, match=complaint):
        results_page({"2_graphs": {"GAT": entry(0.75)}}, published)


def test_a_row_of_readme_that_was_not_recorded_is_an_error():
    with pytest.raises(ValueError, match="1_grad_cam has recorded no result 'x'"):
        readme_table(RESULTS, PUBLISHED, [("1_grad_cam", "x", "y")])
