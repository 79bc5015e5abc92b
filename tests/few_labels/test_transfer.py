"""Few labels: the probe against scikit-learn, budgets, folded norms, fine-tuning, and paired comparisons."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from pdl_utils.few_labels import transfer
from pdl_utils.few_labels.transfer import Recipe, fine_tune, linear_probe, paired, train_on, without_head
from pdl_utils.images import Augmentation, normalize, outputs
from pdl_utils.resnet import cifar_resnet18


def pictures(count=24):
    """Red, green and blue noise, class by class in turn."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), labels] += 120
    return images, labels


def small_resnet():
    """With batch norm statistics that are not those of the start."""
    torch.manual_seed(0)
    network = cifar_resnet18(3, width=16, stem_stride=2)
    network(normalize(pictures()[0]))
    return network.eval()


@pytest.mark.parametrize(("classes", "counts"), [([0, 1, 2, 3], [6, 12, 18, 24]), ([1, 3], [20, 40])])
def test_the_probe_is_scikit_learns_logistic_regression(classes, counts):
    labels = np.repeat(classes, counts)
    x = np.random.default_rng(0).normal(size=(60, 5)) * [1, 10, 0.1, 3, 1] + labels[:, None] + 100
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000, class_weight="balanced"))
    expected = torch.from_numpy(peer.fit(x, labels).predict_proba(x))
    features = torch.from_numpy(x).float()
    ours = linear_probe(features, torch.from_numpy(labels), 4, C=0.3)(features).softmax(1)
    torch.testing.assert_close(ours[:, classes].double(), expected, atol=5e-3, rtol=0)
    unseen = [c for c in range(4) if c not in classes]
    assert (ours[:, unseen] < 1e-6).all()  # no example, no guess
    with pytest.raises(ValueError, match=r"labels are \[-1, .* 4 classes, from 0 on"):
        linear_probe(features, torch.from_numpy(labels - labels.min() - 1), 4)


def test_pseudo_labels_improve_a_probe_of_few_labels():
    labels = torch.arange(600) % 3
    noise = torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
    features = noise + 3 * torch.eye(20)[labels]
    untaught = linear_probe(features[:6], labels[:6], 3, C=0.1)
    taught = transfer.self_train(features[:6], labels[:6], features, 3, C=0.1)
    before, after = (transfer.share_right(probe(features), labels) for probe in (untaught, taught))
    assert after > before + 0.05


class Counting(nn.Module):
    """Counts the batches it is trained on; its logits are a parameter each class."""

    def __init__(self):
        super().__init__()
        self.logits, self.sizes = nn.Parameter(torch.zeros(3)), []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.logits.expand(len(x), 3)


def test_every_set_of_labels_gets_the_same_number_of_steps():
    for count, batch in ((3, 3), (20, 8)):
        model = Counting()
        train_on(model, *pictures(count), Recipe(12, lr=0.1, weight_decay=0, batch_size=8))
        assert model.sizes == [batch] * 12


@pytest.mark.parametrize("batch_size", [1, 24])
def test_every_class_counts_the_same_in_the_loss_whatever_the_batch(batch_size):
    """16 of class 1 and 4 of each other: logits that see no image stay equal."""
    labels = torch.tensor([0, 2] * 4 + [1] * 16)
    model = Counting()
    train_on(model, pictures(24)[0], labels, Recipe(600, lr=0.05, weight_decay=0, batch_size=batch_size))
    torch.testing.assert_close(model.logits.detach().softmax(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)


def test_the_seed_decides_about_order_and_augmentation():
    recipe = Recipe(2, lr=0.05, weight_decay=0, batch_size=8, augment=Augmentation(flip=True, jitter=0.3))
    weights = []
    for seed in (0, 0, 1):
        model = small_resnet()
        train_on(model, *pictures(), recipe, seed)
        weights.append(model.conv1.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_without_its_head_a_network_gives_the_same_features_without_batch_norms():
    network, images = small_resnet().train(), normalize(pictures()[0])
    encoder = without_head(network)
    assert network.training
    assert not encoder.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    expected = network.eval()(images)
    torch.testing.assert_close(network.fc(encoder(images)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AttributeError, match="fc"):
        without_head(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))


def test_fine_tuning_starts_from_the_probe_trains_all_weights_and_leaves_the_encoder_alone():
    images, labels = pictures()
    encoder = without_head(small_resnet())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    way = fine_tune(encoder, 3, C=1.0)
    still = way(images, labels, Recipe(1, 0.0, 0.0, batch_size=8), 0)
    probe = linear_probe(outputs(encoder, images), labels, 3, C=1.0)
    torch.testing.assert_close(outputs(still, images), probe(outputs(encoder, images)), rtol=1e-4, atol=1e-4)
    tuned = way(images, labels, Recipe(4, 1e-2, 0.0, batch_size=8), 0)
    pairs = zip(tuned.named_parameters(), still.parameters(), strict=True)
    assert [name for (name, value), old in pairs if torch.equal(value, old)] == []
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_what_is_grey_and_not_square_is_trained_on_as_it_is():
    model, seen = small_resnet(), []
    model.register_forward_pre_hook(lambda net, inputs: seen.append(tuple(inputs[0].shape)))
    images, labels = pictures(8)
    train_on(model, images[:, :, :, :24], labels, Recipe(1, 0.01, 0.0, batch_size=8))
    train_on(model, images[:, :1, :, :24], labels, Recipe(1, 0.01, 0.0, batch_size=8, size=48))
    assert seen == [(8, 3, 32, 24), (8, 3, 64, 48)]


def test_a_paired_difference_is_that_of_scipy():
    rng = np.random.default_rng(0)
    other = rng.normal(0.5, 0.1, 30)  # how hard a set is, for both ways
    one = other + rng.normal(0.02, 0.01, 30)
    found, peer = paired(one, other), stats.ttest_rel(one, other).confidence_interval()
    assert (found.low, found.high) == (peer.low, peer.high)
    assert found.low < found.mean == pytest.approx(np.mean(one) - np.mean(other))
    assert not found.tie
    assert paired(one, rng.permutation(one)).tie
    assert str(paired([0.5, 0.75], [0.25, 0.5])) == "+25.0 points (on every set)"  # no spread
    with pytest.raises(ValueError, match="2 and 3 accuracies; give the same two or more label sets"):
        paired([0.5, 0.5], [0.5, 0.6, 0.7])


def test_of_options_that_tie_the_cheapest_is_chosen():
    scores = {"cheap": [0.50, 0.62, 0.55], "dear": [0.52, 0.61, 0.57], "poor": [0.30, 0.31, 0.29]}
    assert transfer.choose(scores) == "cheap"
    assert transfer.choose({**scores, "best": [0.60, 0.72, 0.65]}) == "best"


def test_a_table_compares_on_the_label_sets_that_both_were_tried_on():
    rows = transfer.against({"probe": [0.5, 0.7, 0.9], "tuned": [0.6, 0.8]}, [("tuned", "probe")])
    assert rows == [["tuned", "70.0% ± 14.1", "probe", "+10.0 points (on every set)", "2"]]
    assert "a tie" in transfer.against({"a": [0.1, 0.3], "b": [0.3, 0.1]}, [("a", "b")])[0][3]


@pytest.fixture
def trials():
    """60 images as a pool, 24 others as judges; three sets of 20; and the settings of all that was kept."""
    images, labels = pictures(84)
    kept = []

    def keep(name, compute, *code, **settings):
        kept.append(settings)
        return compute()

    judges = {"test": (images[60:], labels[60:]), "validation": (images[60:72], labels[60:72])}
    tried = transfer.Trials(images[:60], labels[:60], judges, 3, keep, "noise")
    return tried, torch.arange(60).view(3, 20), kept


def test_probes_are_tried_on_every_set_and_pseudo_labels_too(trials):
    trials, sets, _ = trials
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    features = trials.features(encoder, 60)
    assert [len(part) for part in features.values()] == [60, 24, 12]
    torch.testing.assert_close(features["test"], outputs(encoder, trials.judges["test"][0]))
    turned = trials.features(encoder, 60, mirror=True)
    torch.testing.assert_close(turned["pool"], outputs(encoder, trials.images.flip(3)))
    assert trials.probe(features, 1.0, sets) == trials.self_train(features, 1.0, sets) == [1.0] * 3
    assert trials.best_penalty(features, sets) == 1e-3  # all tie


def test_trained_networks_are_kept_one_by_one_and_tuning_tries_each_option(trials):
    trials, sets, kept = trials
    recipe, way = Recipe(2, 0.05, 0.0, batch_size=8), fine_tune(without_head(small_resnet()), 3, C=1.0)
    options = {"none": replace(recipe, lr=0), "some": replace(recipe, lr=1e-3)}
    best, tuned, tried = trials.tune("tuned", way, options, sets[2:], sets[:2])
    assert [settings["judge"] for settings in kept] == ["validation"] * 2 + ["test"] * 2
    assert len({str(settings) for settings in kept}) == 4
    assert kept[0]["rows"] == sets[2].tolist()
    assert len(tuned) == 2
    assert tried.keys() == options.keys()
    assert sum(tried[next(name for name in options if options[name] == best)]) == max(map(sum, tried.values()))
    only = trials.tune("scratch", transfer.from_scratch(3), {"one": recipe}, sets[2:], sets[:2])
    assert (only[0], only[2]) == (recipe, {})  # nothing to choose
