"""Numbers of the graph notebook, against small cases that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import f1_score
from torch._subclasses.fake_tensor import FakeTensorMode

from pdl_utils.graphs import SortedEdges, metrics


def edges_of(pairs: list[tuple[int, int]], nodes: int) -> SortedEdges:
    return SortedEdges.from_edges(torch.tensor(pairs).T, nodes)


def test_micro_f1_by_hand_and_as_scikit_learn_has_it():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    logits = torch.tensor([[2.0, 1.0, -1.0], [-1.0, -1.0, 0.5]])  # 2 right, 1 too many, 1 missed
    assert metrics.micro_f1(logits, labels) == pytest.approx(2 * 2 / (3 + 3))
    assert metrics.micro_f1(torch.zeros(2, 3), labels) == 0  # a logit of 0 predicts nothing
    assert metrics.micro_f1(-torch.ones(2, 3), torch.zeros(2, 3)) == 1
    expected = torch.tensor([1.0, 0.0, 2 / 3]).double()
    torch.testing.assert_close(metrics.label_f1(logits, labels).nan_to_num(-1), expected)
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=generator), torch.rand(50, 7, generator=generator).round()
    assert metrics.micro_f1(logits, labels) == pytest.approx(f1_score(labels, logits > 0, average="micro"))
    assert metrics.label_f1(logits, labels).tolist() == pytest.approx(f1_score(labels, logits > 0, average=None))


def test_f1_by_rank_puts_the_smallest_first():
    labels = torch.ones(4, 3)
    logits = torch.tensor([1.0, -1.0, 1.0, -1.0]).unsqueeze(1).expand(4, 3)  # nodes 0 and 2 are right
    assert metrics.f1_by_rank(logits, labels, torch.tensor([0.1, 5.0, 0.2, 7.0]), groups=2) == [1.0, 0.0]


def test_constant_guess_takes_the_share_that_suits_the_test_labels():
    train = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])  # 100%, 33%, 0%
    assert metrics.constant_guess(train, torch.tensor([[1.0, 0.0, 0.0]])) == 1
    assert metrics.constant_guess(train, torch.tensor([[1.0, 1.0, 0.0]])) == 1
    # A label that nobody has is not guessed.
    assert metrics.constant_guess(train, torch.tensor([[0.0, 1.0, 1.0]])) == 0.5


def test_look_up_rows_gives_the_share_of_each_label_among_equals():
    reference = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    found = metrics.look_up_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), reference, labels)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [1.0, 0.5], [2 / 3, 1 / 3]]))


def test_surroundings_are_means_of_means():
    path = edges_of([(0, 1), (1, 0), (1, 2), (2, 1)], 4)  # 0 - 1 - 2, and 3 alone; each sees itself too
    x = torch.tensor([[6.0], [0.0], [0.0], [5.0]])
    expected = torch.tensor([[6.0, 3.0, 2.5], [0.0, 2.0, 5 / 3], [0.0, 0.0, 1.0], [5.0, 5.0, 5.0]])
    torch.testing.assert_close(metrics.surroundings(x, path, hops=2), expected)
    bare = SortedEdges.from_edges(torch.zeros(2, 0, dtype=torch.long), 4, self_loops=False)
    assert metrics.surroundings(x, bare, hops=1)[:, 1].tolist() == [0, 0, 0, 0]


def test_nearest_finds_the_row_across_blocks():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(700, 30, generator=generator)
    distance, row = metrics.nearest(reference.flip(0) + 1e-3, reference)
    assert torch.equal(row, torch.arange(700).flip(0))
    torch.testing.assert_close(distance, torch.full((700,), 1e-3 * math.sqrt(30)), rtol=0.2, atol=2e-3)


def test_attention_entropy():
    graph = edges_of([(1, 0), (2, 0)], 3)  # node 0 has three edges, the others their loop
    attention = torch.tensor([[1 / 3, 0.5], [1 / 3, 0.5], [1 / 3, 0.0], [1.0, 1.0], [1.0, 1.0]])
    share = metrics.attention_entropy(attention, graph)
    torch.testing.assert_close(share[0], torch.tensor([1, math.log(2) / math.log(3)]))
    assert share[1:].isnan().all()


def test_shared_labels_is_the_jaccard_similarity():
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    graph = SortedEdges.from_edges(torch.tensor([[0, 0, 2], [0, 1, 2]]), 3, self_loops=False)
    assert metrics.shared_labels(labels, graph).tolist() == pytest.approx([1, 1 / 3, 0])


def test_preference_within_one_neighbourhood_is_spearmans_correlation():
    star = edges_of([(node, 0) for node in range(1, 12)], 12)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(len(star.source), 2, generator=generator)
    value = torch.randint(4, (len(star.source), 1), generator=generator)  # with ties
    seen = (star.target == 0) & (star.source != 0)
    expected = [spearmanr(weight[seen, head], value[seen, 0]).statistic for head in range(2)]
    assert metrics.preference(weight, value, star)[:, 0].tolist() == pytest.approx(expected)


def test_preference_compares_within_neighbourhoods_only():
    """Values that differ between targets alone are no preference, whatever the attention does."""
    generator = torch.Generator().manual_seed(1)
    graph = SortedEdges.from_edges(torch.randint(40, (2, 300), generator=generator), 40)
    weight = torch.rand(len(graph.source), 1, generator=generator)
    order = weight[:, 0] + 10 * torch.rand(graph.num_nodes, generator=generator)[graph.target]
    values = torch.stack([order, -order, graph.target.float()], dim=1)
    found = metrics.preference(weight, values, graph)[0]
    assert found[:2].tolist() == pytest.approx([1, -1])
    assert found[2].isnan()  # never varies within a neighbourhood
    assert metrics.preference(torch.ones(len(graph.source), 1), values, graph).isnan().all()  # uniform attention


def test_edge_auc_leaves_self_loops_and_other_targets_out():
    graph = edges_of([(0, 1), (2, 1), (0, 2), (1, 2)], 3)  # in this order, with a loop each: see the next line
    assert graph.edge_index.tolist() == [[0, 0, 1, 2, 0, 1, 2], [0, 1, 1, 1, 2, 2, 2]]
    wanted = torch.tensor([False, True, False, False, True, False, False])
    weight = torch.tensor([9.0, 0.8, 9.0, 0.1, 0.2, 0.9, 9.0])
    assert metrics.edge_auc(weight, wanted, graph) == 0.5
    assert metrics.edge_auc(weight, wanted, graph, torch.tensor([False, True, False])) == 1
    assert metrics.edge_auc(weight, wanted, graph, torch.tensor([False, False, True])) == 0


def test_dirichlet_energy():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    graph = edges_of([(0, 1), (1, 0), (1, 2), (2, 1)], 3)
    assert metrics.dirichlet_energy(x, graph) == pytest.approx(2 * (25 + 18) / 26)
    assert metrics.dirichlet_energy(5 * x.repeat(1, 40), graph) == pytest.approx(2 * (25 + 18) / 26)
    assert metrics.dirichlet_energy(torch.ones(3, 70), graph) == 0
    assert metrics.dirichlet_energy(torch.zeros(3, 2), graph) == 0


def test_mean_average_distance():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    diagonal = 1 - math.sqrt(0.5)
    assert metrics.mean_average_distance(x) == pytest.approx((1 + 2 * diagonal) / 3)
    assert metrics.mean_average_distance(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)


def test_tensors_stay_on_their_device():
    """On fake CUDA tensors, for what does not depend on the data."""
    with FakeTensorMode(), torch.device("cuda"):
        ids = torch.zeros(9, dtype=torch.long)
        graph = SortedEdges(3, ids, ids, torch.zeros(4, dtype=torch.long))
        attention, labels = torch.zeros(9, 2), torch.zeros(3, 5)
        answers = [metrics.label_f1(labels, labels), metrics.attention_entropy(attention, graph)]
        answers += [metrics.surroundings(labels, graph, 2), metrics.shared_labels(labels, graph)]
        answers += metrics.nearest(labels, labels)
        assert {answer.device.type for answer in answers} == {"cuda"}
