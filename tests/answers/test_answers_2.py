"""The exercises of notebook 2: each change of docs/answers.md in its core cells, and what the dictionary shows."""

import math

import pytest

CORES = ("def softmax_into", "def gatv2(", "def learn_look_up")
GAT_SCORE = "    score = F.leaky_relu((h @ a_source)[source] + (h @ a_target)[target], 0.2)  # (E,)\n"
PAIR = "F.leaky_relu(h[source] + query[target], 0.2) @ a"
OWN_MAXIMUM = 'top = score.new_full((nodes,), -torch.inf).scatter_reduce(0, target, score.detach(), "amax")'
ONE_MAXIMUM = {OWN_MAXIMUM: "top = score.detach().max().expand(nodes)"}
LARGE = {PAIR: PAIR + " * 1000"}


def shares(cells, core: str, change: dict[str, str] | None = None, seeds: int = 3) -> list[float]:
    """Share of keys that are found, for every seed."""
    space = cells.run(*CORES, change=change)
    return [space["learn_look_up"](space[core], seed)[0] for seed in range(seeds)]


@pytest.fixture
def cells(notebook_cells):
    return notebook_cells("2_graph_attention")


def test_unchanged_gat_guesses_and_gatv2_finds_all_keys(cells):
    assert shares(cells, "gat") == pytest.approx([0.1] * 3)
    assert shares(cells, "gatv2") == [1] * 3


def test_1_with_a_product_in_its_score_gat_finds_all_keys(cells):
    more = GAT_SCORE + "    score = score + (h[source] * h[target]).sum(1)\n"
    assert shares(cells, "gat", {GAT_SCORE: more}) == [1] * 3


def test_2_with_the_leaky_relu_behind_the_product_gatv2_guesses(cells):
    behind = "F.leaky_relu((h[source] + query[target]) @ a, 0.2)"
    assert shares(cells, "gatv2", {PAIR: behind}) == pytest.approx([0.1] * 3)


def test_3_one_maximum_for_the_graph_breaks_when_scores_are_large(cells):
    assert shares(cells, "gatv2", ONE_MAXIMUM) == [1] * 3
    found = shares(cells, "gatv2", ONE_MAXIMUM | LARGE, seeds=6)
    assert any(math.isnan(share) for share in found)
    assert shares(cells, "gatv2", LARGE, seeds=6) == [1] * 6


def test_4_with_negative_slope_1_gatv2_guesses(cells):
    assert shares(cells, "gatv2", {"query[target], 0.2)": "query[target], 1.0)"}) == pytest.approx([0.1] * 3)
