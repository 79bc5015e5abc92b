"""Numbers of the graph notebook, against small cases that can be checked by hand."""

import math

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch_geometric.utils import add_remaining_self_loops, sort_edge_index

from pdl_utils.datasets.synthetic_graphs import SMALL, ppi_stand_in
from pdl_utils.graphs import metrics


def edges_of(pairs: list[tuple[int, int]], nodes: int) -> Tensor:
    """As a layer gives them: with self-loops, sorted by target."""
    edge_index, _ = add_remaining_self_loops(torch.tensor(pairs).T, num_nodes=nodes)
    return sort_edge_index(edge_index, sort_by_row=False)


def test_micro_f1_is_scikit_learns():
    assert metrics.micro_f1(torch.zeros(2, 3), torch.ones(2, 3)) == 0  # a logit of 0 predicts nothing
    assert metrics.micro_f1(-torch.ones(2, 3), torch.zeros(2, 3)) == 1
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=generator), torch.rand(50, 7, generator=generator).round()
    assert metrics.micro_f1(logits, labels) == pytest.approx(f1_score(labels, logits > 0, average="micro"))
    with pytest.raises(ValueError, match=r"logits \(4, 1\) and labels \(4,\) must have the same shape"):
        metrics.micro_f1(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match="no NaN"):
        metrics.micro_f1(0 * logits / 0, labels)


@pytest.mark.parametrize(("labels", "score"), [([1, 0, 0], 1), ([1, 1, 0], 1), ([0, 1, 1], 0.5)])
def test_constant_guess_takes_the_share_that_suits_the_test_labels(labels, score):
    train = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0]])  # 100%, 33%, and a label that nobody has
    test = torch.tensor([labels])
    assert metrics.micro_f1(metrics.constant_guess(train, test).expand(1, 3), test) == score


def test_neighbourhood_features_are_means_of_means():
    path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # 0 - 1 - 2, and 3 alone; each sees itself too
    x = torch.tensor([[6.0], [0.0], [0.0], [5.0]])
    expected = torch.tensor([[6.0, 3.0, 2.5], [0.0, 2.0, 5 / 3], [0.0, 0.0, 1.0], [5.0, 5.0, 5.0]])
    torch.testing.assert_close(metrics.neighbourhood_features(x, path, hops=2), expected)
    found = metrics.neighbourhood_features(x > 5, path, hops=1)[:, 1]  # a mean also of booleans
    torch.testing.assert_close(found, torch.tensor([0.5, 1 / 3, 0, 0]))


def test_look_up_takes_the_mean_of_equal_rows():
    reference = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    query = torch.tensor([[1.0, 0.0], [0.0, 1.00001], [-5.0, 5.0]]).repeat(300, 1)  # more than one block
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.5], [1.0, 0.5]]).repeat(300, 1)
    for given in (labels, labels.bool()):
        torch.testing.assert_close(metrics.look_up(query, reference, given), expected)


def test_attention_entropy():
    edges = edges_of([(1, 0), (2, 0)], 3)  # node 0 has three edges, the others their loop
    alpha = torch.tensor([[1 / 3, 0.5], [1 / 3, 0.5], [1 / 3, 0.0], [1.0, 1.0], [1.0, 1.0]])
    share = metrics.attention_entropy(edges, alpha)
    torch.testing.assert_close(share[0], torch.tensor([1, math.log(2) / math.log(3)]))
    assert share[1:].isnan().all()
    assert torch.equal(metrics.attention_entropy(edges, alpha[:, 1])[:1], share[:1, 1])  # of one head


def test_jaccard():
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    edges = torch.tensor([[0, 0, 2], [0, 1, 2]]).repeat(1, 2**15)  # more than one block
    torch.testing.assert_close(metrics.jaccard(labels, edges), torch.tensor([1, 1 / 3, 0]).repeat(2**15))


def test_preference_is_spearmans_correlation_in_one_neighbourhood_and_compares_within_neighbourhoods_only():
    star = edges_of([(node, 0) for node in range(1, 12)], 12)
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(star.shape[1], 2, generator=generator)
    value = torch.randint(4, (star.shape[1], 1), generator=generator)  # with ties
    seen = (star[1] == 0) & (star[0] != 0)
    expected = [spearmanr(alpha[seen, head], value[seen, 0]).statistic for head in range(2)]
    assert metrics.preference(star, alpha, value)[:, 0].tolist() == pytest.approx(expected)
    assert metrics.preference(star, alpha, value / 0).isnan().all()

    # Values that differ between targets alone are no preference, whatever the attention does.
    edges = edges_of(torch.randint(40, (300, 2), generator=generator).tolist(), 40)
    alpha = torch.rand(edges.shape[1], 1, generator=generator)
    order = alpha[:, 0] + 10 * torch.rand(40, generator=generator)[edges[1]]
    found = metrics.preference(edges, alpha, torch.stack([order, -order, edges[1].float()], dim=1))[0]
    assert found.tolist() == pytest.approx([1, -1, math.nan], nan_ok=True)


def test_attention_gain_by_hand_and_under_shuffling():
    edges = edges_of([(1, 0), (2, 0), (0, 1)], 4)  # 0 ← 0 1 2; 1 ← 0 1; 2 and 3 have only themselves
    alpha = torch.tensor([[0.2, 0.0], [0.6, 0.5], [0.2, 0.5], [0.5, 0.5], [0.5, 0.5], [1, 1], [1, 1]])
    value = torch.tensor([9.0, 1.0, 0.0, 5.0, 9.0, 9.0, 9.0])
    torch.manual_seed(0)
    found = metrics.attention_gain(edges, alpha, value, shuffles=50)
    torch.testing.assert_close(found[0], torch.tensor([(0.75 - 0.5 + 0) / 2, 0]))  # mean over nodes 0 and 1
    assert set(found[1:, 0].mul(8).round().tolist()) == {-1, 1}  # 0.75 on the first or on the second
    torch.testing.assert_close(metrics.attention_gain(edges, alpha, value == 1), found[:1])
    alone = alpha * torch.tensor([1, 0, 0, 1, 1, 1, 1])[:, None]  # node 0 attends to itself alone
    assert metrics.attention_gain(edges, alone, 0 * value + 7).tolist() == [[0, 0]]


class Told(nn.Module):
    """Attends by the number of a node's complex: to its own in compartment 0, to others in compartment 1."""

    def forward(self, x: Tensor, edge_index: Tensor, return_attention_weights: bool) -> tuple:
        own, here = x[edge_index[0], 1] == x[edge_index[1], 1], x[edge_index[1], 0] > 0
        alpha = torch.stack([own, own == here, torch.ones_like(own)], dim=1).float()
        return x, (edge_index, [alpha[:, :2], alpha[:, 2:]])


def test_compartment_auc_counts_each_side_by_itself():
    graph = ppi_stand_in(SMALL)["test"][0]
    graph.x[:, 1] = graph.complex.float()
    found = metrics.compartment_auc(Told(), graph)
    assert found[:2] == [[1, 1], [1, 0]]
    assert found[2][0] < 0.6  # uniform attention: the degree alone


def test_dirichlet_energy():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    edges = edges_of([(0, 1), (1, 0), (1, 2), (2, 1)], 3)
    for scaled in (x, 5 * x.repeat(1, 40)):  # more than one block of channels
        assert metrics.dirichlet_energy(scaled, edges) == pytest.approx(2 * (25 + 18) / 26)
    assert metrics.dirichlet_energy(torch.ones(3, 2), edges) == metrics.dirichlet_energy(0 * x, edges) == 0
