"""Few labels: the probe against scikit-learn, budgets, folded norms, fine-tuning, outcomes, and digits."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from pdl_utils.datasets import LabelledImages, Provenance
from pdl_utils.few_labels import (
    LoRA,
    Recipe,
    fine_tune,
    five_digits,
    linear_probe,
    measure,
    mlp,
    probe_outcome,
    probe_scores,
    recipe_scores,
    self_train,
    share_right,
    train_adam,
    train_on,
    without_head,
)
from pdl_utils.images import Augmentation, normalize, outputs
from pdl_utils.resnet import cifar_resnet18


def pictures(count=24):
    """Red, green and blue noise, class by class in turn."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), labels] += 120
    return images, labels


def small_resnet(classes=3):
    """With batch norm statistics that are not those of the start."""
    torch.manual_seed(0)
    network = cifar_resnet18(classes, width=16, stem_stride=2)
    network(normalize(pictures()[0]))
    return network.eval()


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [1, 3]])
def test_the_probe_is_scikit_learns_logistic_regression(classes):
    rng = np.random.default_rng(0)
    labels = rng.choice(classes, 60, p=np.arange(1, len(classes) + 1) / np.arange(1, len(classes) + 1).sum())
    x = rng.normal(size=(60, 5)) * [1, 10, 0.1, 3, 1] + labels[:, None] + 100
    probe = linear_probe(torch.from_numpy(x).float(), torch.from_numpy(labels), 4, C=0.3)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000, class_weight="balanced"))
    peer.fit(x, labels)
    ours = probe(torch.from_numpy(x).float()).softmax(1)
    torch.testing.assert_close(
        ours[:, classes].double(), torch.from_numpy(peer.predict_proba(x)), atol=5e-3, rtol=0
    )
    unseen = [c for c in range(4) if c not in classes]
    assert (ours[:, unseen] < 1e-6).all()  # no example, no guess


def test_pseudo_labels_improve_a_probe_of_few_labels():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    features = torch.randn(600, 20, generator=generator) + 3 * torch.eye(20)[labels]
    few, test = (features[:6], labels[:6]), (features, labels)
    probe = linear_probe(*few, 3, C=0.1)
    taught = self_train(*few, features, 3, C=0.1)
    assert share_right(taught, test) > share_right(probe, test) + 0.05
    assert torch.equal(self_train(*few, features, 3, C=0.1, rounds=0).weight, probe.weight)
    assert probe_outcome(few, test, 3, 0.1, features).accuracy == [share_right(taught, test)]
    assert probe_outcome(few, test, 3, 0.1).accuracy == [share_right(probe, test)]


def test_scores_and_outcomes_of_probes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 4, generator=generator)
    features[torch.arange(60), labels] += 6
    labelled, test = (features[:30], labels[:30]), (features[30:], labels[30:])
    outcome = probe_outcome(labelled, test, 3, C=1.0)
    assert outcome.probabilities.shape == (1, 30, 3)
    assert outcome.accuracy[0] > 0.9
    shifted = labelled[0], (labelled[1] + 1) % 3  # learns the wrong names
    assert probe_scores([1.0], [labelled], test, 3) == pytest.approx(outcome.accuracy)
    assert probe_scores([1.0, 0.1], [shifted], test, 3) == pytest.approx([0, 0], abs=0.1)


class Counting(nn.Module):
    """Counts the batches it is trained on; its logits are a parameter each class."""

    def __init__(self):
        super().__init__()
        self.logits, self.sizes = nn.Parameter(torch.zeros(3)), []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.logits.expand(len(x), 3)


@pytest.mark.parametrize(("count", "steps"), [(3, 12), (8, 12), (24, 12), (20, 12)])
def test_every_set_of_labels_gets_the_same_number_of_steps(count, steps):
    model = Counting()
    train_on(model, *pictures(count), Recipe(12, lr=0.1, weight_decay=0, batch_size=8))
    assert model.sizes == [min(8, count)] * steps


def test_every_class_counts_the_same_in_the_loss():
    """16 of class 1 and 4 of each other: with equal weights, logits that see no image stay equal."""
    images, labels = pictures(24)
    labels = torch.tensor([0, 2] * 4 + [1] * 16)
    model = Counting()
    train_on(model, images, labels, Recipe(20, lr=0.5, weight_decay=0, batch_size=24))
    assert model.logits.detach().abs().max() < 1e-4


def test_the_seed_decides_about_order_and_augmentation():
    images, labels = pictures()
    recipe = Recipe(4, lr=0.05, weight_decay=0, batch_size=8, augment=Augmentation(flip=True, shift=4, jitter=0.3))
    weights = []
    for seed in (0, 0, 1):
        model = small_resnet()
        train_on(model, images, labels, recipe, seed)
        weights.append(model.layer4[0].conv1.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_without_its_head_a_network_gives_the_same_features_without_batch_norms():
    network = small_resnet().train()
    encoder = without_head(network)
    assert not encoder.training
    assert network.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    images = pictures()[0]
    torch.testing.assert_close(
        network.fc(encoder(normalize(images))), network.eval()(normalize(images)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rank", [None, 2])
def test_fine_tuning_starts_from_the_probe_and_leaves_the_encoder_alone(rank):
    images, labels = pictures()
    encoder = without_head(small_resnet())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    still = fine_tune(encoder, images, labels, 3, Recipe(1, 0.0, 0.0, batch_size=8), C=1.0, rank=rank)
    probe = linear_probe(outputs(encoder, images), labels, 3, C=1.0)
    torch.testing.assert_close(outputs(still, images), probe(outputs(encoder, images)), rtol=1e-4, atol=1e-4)
    tuned = fine_tune(encoder, images, labels, 3, Recipe(4, 1e-2, 0.0, batch_size=8), C=1.0, rank=rank)
    assert not torch.allclose(outputs(tuned, images), outputs(still, images), atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    adapted = {name for name, module in tuned.named_modules() if isinstance(module, LoRA)}
    assert (len(adapted) > 0) == (rank is not None)
    if rank:
        frozen = {name for name, p in tuned.named_parameters() if not p.requires_grad}
        assert {"conv1.weight", "layer4.1.conv2.base.weight"} <= frozen
        assert "fc.weight" not in frozen


def test_outcomes_are_remembered_only_where_they_are_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("PDL_DATA", str(tmp_path))
    images, labels = pictures()
    trained = []

    def train(images, labels, recipe, seed):
        trained.append(seed)
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
        with torch.no_grad():
            model[2].weight.copy_(torch.eye(3).roll(seed, 0))
        return model

    recipe = Recipe(1, lr=0.1, weight_decay=0)
    sets = [(images[:9], labels[:9])] * 2
    for _ in range(2):
        outcome = measure(train, recipe, sets, (images, labels), keep={"what": "test"})
    assert outcome.probabilities.shape == (2, 24, 3)
    assert outcome.accuracy == [1.0, 0.0]
    assert trained == [0, 1]
    measure(train, recipe, sets, (images, labels), keep={"what": "something else"})
    measure(train, recipe, sets, (images, labels))
    assert trained == [0, 1] * 3


def test_a_recipe_that_diverges_scores_nothing():
    images, labels = pictures()

    def train(images, labels, recipe, seed):
        model = small_resnet()
        train_on(model, images, labels, recipe, seed)
        return model

    recipes = [Recipe(20, lr, 1e-4, batch_size=8) for lr in (0.05, 1e12)]
    good, diverged = recipe_scores(train, recipes, [(images, labels)], (images, labels))
    assert good > 0.9
    assert diverged == 0


def test_five_digits_split_without_overlap_and_an_mlp_learns_them():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 10
    images = torch.randint(0, 60, (400, 1, 28, 28), dtype=torch.uint8, generator=generator)
    images[torch.arange(400), 0, labels] += 150
    digits = LabelledImages(images, labels, images, labels, "0123456789", Provenance("MNIST", "test"))
    train, val, test = five_digits(digits, 5, 100, 150, torch.device("cpu"))
    assert [len(y) for _, y in (train, val, test)] == [100, 20, 150]
    assert sorted(test[1].unique().tolist()) == [0, 1, 2, 3, 4]
    assert not (train[0][:, None] == val[0][None]).all(2).any()
    net = mlp()
    train_adam(net, train, lr=1e-3, epochs=3, batch_size=20)
    assert not net.training
    assert share_right(net, test) > 0.9
    assert share_right(net, (test[0], (test[1] + 1) % 5)) < 0.1
