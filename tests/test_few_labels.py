"""Learning from few labels: the probe against scikit-learn, what stays frozen, budgets, and fine-tuning."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from pdl_utils.evaluation import linear_probe, outputs, top1
from pdl_utils.few_labels import transfer as few_labels
from pdl_utils.few_labels.transfer import Recipe, fine_tune, train_on, without_head
from pdl_utils.images import Augmentation
from pdl_utils.resnet import cifar_resnet18


def pictures(count=24):
    """Red, green and blue noise, class by class in turn."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), labels] += 120
    return images, labels


def small_resnet(classes=3):
    torch.manual_seed(0)
    return cifar_resnet18(classes, width=16, stem_stride=2)


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [1, 3]])
def test_the_probe_is_scikit_learns_logistic_regression(classes):
    rng = np.random.default_rng(0)
    labels = rng.choice(classes, 60, p=np.arange(1, len(classes) + 1) / np.arange(1, len(classes) + 1).sum())
    x = rng.normal(size=(60, 5)) * [1, 10, 0.1, 3, 1] + labels[:, None] + 100
    probe = linear_probe(torch.from_numpy(x).float(), torch.from_numpy(labels), 4, C=0.3)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000, class_weight="balanced"))
    peer.fit(x, labels)
    ours = probe(torch.from_numpy(x).float()).softmax(1).detach()
    assert ours.shape == (60, 4)
    torch.testing.assert_close(
        ours[:, classes].double(), torch.from_numpy(peer.predict_proba(x)), atol=5e-3, rtol=0
    )
    unseen = [c for c in range(4) if c not in classes]
    assert (ours[:, unseen] < 1e-6).all()  # no example, no guess


def test_accuracy_counts_what_is_right():
    images, labels = pictures()
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(3))
        model[2].bias.zero_()
    assert top1(model, images, labels) == 1
    assert top1(model, images, labels, size=64) == 1
    assert top1(model, images, (labels + 1) % 3) == 0
    assert outputs(model, images, batch=5).shape == (24, 3)


def test_training_fits_its_images_and_ends_in_eval_mode():
    images, labels = pictures()
    model = small_resnet()
    history = train_on(model, images, labels, Recipe(30, lr=0.05, weight_decay=1e-4, batch_size=8))
    assert not model.training
    assert history["loss"][-1] < 0.3 < history["loss"][0]
    assert top1(model, images, labels) > 0.9


@pytest.mark.parametrize(("count", "epochs"), [(3, 12), (8, 12), (24, 4), (20, 6)])
def test_every_set_of_labels_gets_the_same_number_of_steps(monkeypatch, count, epochs):
    seen = {}

    def fit(model, batches, loss, optimizer, *, epochs, **rest):
        seen.update(epochs=epochs, sizes=[len(y) for _, y in batches(0)])

    monkeypatch.setattr(few_labels, "fit", fit)
    images, labels = pictures(count)
    train_on(small_resnet(), images, labels, Recipe(12, lr=0.1, weight_decay=0, batch_size=8))
    assert seen["epochs"] == epochs
    assert seen["sizes"] == [min(8, count)] * max(1, count // 8)


def test_every_class_counts_the_same_in_the_loss(monkeypatch):
    caught = {}
    monkeypatch.setattr(few_labels, "fit", lambda model, batches, loss, *rest, **options: caught.update(loss=loss))
    images, labels = pictures(12)
    labels[:6] = 1  # 8 of class 1, 2 of the others
    model = small_resnet().eval()
    train_on(model, images, labels, Recipe(1, lr=0.1, weight_decay=0, batch_size=8))
    x = torch.rand(12, 3, 32, 32)
    expected = nn.functional.cross_entropy(model(x), labels, 1 / torch.tensor([2.0, 8.0, 2.0]))
    torch.testing.assert_close(caught["loss"](model, (x, labels)), expected)


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


def test_frozen_parameters_stay():
    images, labels = pictures()
    model = small_resnet().requires_grad_(False)
    model.fc.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_on(model, images, labels, Recipe(3, lr=0.1, weight_decay=0.1, batch_size=8))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"fc.weight", "fc.bias"}


def test_a_headless_copy_gives_features_and_leaves_the_network_alone():
    network = small_resnet().train()
    encoder = without_head(network)
    assert not encoder.training
    assert network.training
    assert isinstance(network.fc, nn.Linear)
    assert outputs(encoder, pictures()[0]).shape == (24, 128)


def test_frozen_norms_compute_what_they_did_in_eval_mode_and_stay():
    network = small_resnet().train()
    network(torch.rand(8, 3, 32, 32))  # statistics that are not those of the start
    x = torch.rand(4, 3, 32, 32)
    expected = network.eval()(x)
    frozen = few_labels.freeze_norms(network)
    torch.testing.assert_close(frozen(x), expected)
    torch.testing.assert_close(frozen.train()(x), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())


def test_fine_tuning_starts_from_the_probe_and_does_not_touch_the_pretrained_network(monkeypatch):
    images, labels = pictures()
    network = small_resnet(classes=7).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    started = []
    original = few_labels.train_on

    def watching(model, *rest):
        started.append(top1(model, images, labels))
        return original(model, *rest)

    monkeypatch.setattr(few_labels, "train_on", watching)
    tuned = fine_tune(network, images, labels, 3, Recipe(4, lr=1e-3, weight_decay=0, batch_size=8), C=1.0)
    assert started[0] == 1  # not a random head
    assert tuned.fc.out_features == 3
    assert not torch.equal(tuned.conv1.weight, network.conv1.weight)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
