"""The exercises of notebook 2: each change of docs/answers.md in its core cells, and what the dictionary shows."""

import math

import pytest

CORES = ("def softmax_into", "def gatv2(", "def learn_look_up")
GAT_SCORE = "    score = F.leaky_relu((h @ a_source)[source] + (h @ a_target)[target], 0.2)  # (E,)\n"
PRODUCT = {GAT_SCORE: GAT_SCORE + "    score = score + (h[source] * h[target]).sum(1)\n"}
PAIR = "F.leaky_relu(h[source] + query[target], 0.2) @ a"
LARGE = {PAIR: PAIR + " * 1000"}
OWN_MAXIMUM = 'top = score.new_full((nodes,), -torch.inf).scatter_reduce(0, target, score.detach(), "amax")'
ONE_MAXIMUM = {OWN_MAXIMUM: "top = score.detach().max().expand(nodes)"}


@pytest.fixture
def shares(notebook_cells):
    """Shares of keys that are found, one for each seed."""

    def run(core, change, seeds=3):
        space = notebook_cells("2_graph_attention")(*CORES, change=change)
        return [space["learn_look_up"](space[core], seed)[0] for seed in range(seeds)]

    return run


@pytest.mark.parametrize(
    ("core", "change", "share"),
    [
        ("gat", {}, 0.1),  # as good as guessing
        ("gatv2", {}, 1),
        ("gat", PRODUCT, 1),
        ("gatv2", {PAIR: "F.leaky_relu((h[source] + query[target]) @ a, 0.2)"}, 0.1),
        ("gatv2", ONE_MAXIMUM, 1),
        ("gatv2", {"query[target], 0.2)": "query[target], 1.0)"}, 0.1),
    ],
    ids=["gat", "gatv2", "1 product", "2 LeakyReLU last", "3 one maximum", "4 slope 1"],
)
def test_keys_that_are_found(core, change, share, shares):
    assert shares(core, change) == pytest.approx([share] * 3)


def test_3_one_maximum_for_the_graph_breaks_when_scores_are_large(shares):
    assert any(math.isnan(share) for share in shares("gatv2", ONE_MAXIMUM | LARGE, seeds=6))
    assert shares("gatv2", LARGE, seeds=6) == [1] * 6
