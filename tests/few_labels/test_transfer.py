"""Few labels: the probe against scikit-learn, budgets, folded norms, fine-tuning, and paired comparisons."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from pdl_utils.few_labels.lora import LoRA
from pdl_utils.few_labels.transfer import (
    Recipe,
    Trials,
    against,
    choose,
    fine_tune,
    from_scratch,
    linear_probe,
    paired,
    self_train,
    train_on,
    with_and_without,
    without_head,
)  # fmt: skip
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
    few = features[:6], labels[:6], features
    probe, taught, untaught = (
        linear_probe(*few[:2], 3, C=0.1),
        self_train(*few, 3, 0.1),
        self_train(*few, 3, 0.1, 0),
    )
    right, before = ((net(features).argmax(1) == labels).float().mean() for net in (taught, probe))
    assert right > before + 0.05
    assert torch.equal(untaught.weight, probe.weight)


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


@pytest.mark.parametrize("batch_size", [1, 3, 24])
def test_every_class_counts_the_same_in_the_loss_whatever_the_batch(batch_size):
    """16 of class 1 and 4 of each other: logits that see no image stay equal."""
    labels = torch.tensor([0, 2] * 4 + [1] * 16)
    model = Counting()
    train_on(model, pictures(24)[0], labels, Recipe(600, lr=0.05, weight_decay=0, batch_size=batch_size))
    torch.testing.assert_close(model.logits.detach().softmax(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)


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
    way = fine_tune(encoder, 3, C=1.0, rank=rank)
    still = way(images, labels, Recipe(1, 0.0, 0.0, batch_size=8), 0)
    probe = linear_probe(outputs(encoder, images), labels, 3, C=1.0)
    torch.testing.assert_close(outputs(still, images), probe(outputs(encoder, images)), rtol=1e-4, atol=1e-4)
    tuned = way(images, labels, Recipe(4, 1e-2, 0.0, batch_size=8), 0)
    assert not torch.allclose(outputs(tuned, images), outputs(still, images), atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    adapted = {name for name, module in tuned.named_modules() if isinstance(module, LoRA)}
    assert (len(adapted) > 0) == (rank is not None)
    if rank:
        frozen = {name for name, p in tuned.named_parameters() if not p.requires_grad}
        assert {"conv1.weight", "layer4.1.conv2.base.weight"} <= frozen
        assert "fc.weight" not in frozen


def test_what_is_not_square_is_trained_on_as_it_is():
    model, seen = small_resnet(), []
    model.register_forward_pre_hook(lambda net, inputs: seen.append(tuple(inputs[0].shape)))
    images, labels = pictures(8)
    train_on(model, images[:, :, :, :24], labels, Recipe(1, 0.01, 0.0, batch_size=8))
    train_on(model, images[:, :1, :, :24], labels, Recipe(1, 0.01, 0.0, batch_size=8, size=48))
    assert seen == [(8, 3, 32, 24), (8, 3, 64, 48)]


def test_a_paired_difference_is_that_of_scipy():
    rng = np.random.default_rng(0)
    hard = rng.normal(0.5, 0.1, 30)  # how hard a set is, for both ways
    one, other = hard + rng.normal(0.02, 0.01, 30), hard
    found, peer = paired(one, other), stats.ttest_rel(one, other).confidence_interval()
    assert (found.low, found.high) == (peer.low, peer.high)
    assert found.low < found.mean == pytest.approx(np.mean(one) - np.mean(other))
    assert not found.tie
    assert paired(one, rng.permutation(one)).tie
    assert str(paired([0.5, 0.75], [0.25, 0.5])) == "+25.0 points (+25.0 to +25.0)"
    assert paired([0.5, 0.5], [0.5, 0.5]).tie
    for wrong in ([0.5], [0.5, 0.6, 0.7]):
        with pytest.raises(ValueError, match="the same two or more label sets"):
            paired([0.5] * 2 if len(wrong) > 1 else wrong, wrong)


def test_of_options_that_tie_the_cheapest_is_chosen():
    scores = {"cheap": [0.50, 0.62, 0.55], "dear": [0.52, 0.61, 0.57], "poor": [0.30, 0.31, 0.29]}
    assert choose(scores) == "cheap"
    assert choose({**scores, "best": [0.60, 0.72, 0.65]}) == "best"


def test_a_table_compares_on_the_label_sets_that_both_were_tried_on():
    rows = against({"probe": [0.5, 0.7, 0.9], "tuned": [0.6, 0.8]}, [("tuned", "probe")])
    assert rows == [["tuned", "70.0% ± 14.1", "probe", "+10.0 points (+10.0 to +10.0)", "2"]]
    assert "a tie" in against({"a": [0.1, 0.3], "b": [0.3, 0.1]}, [("a", "b")])[0][3]


@pytest.fixture
def trials():
    """60 images as a pool, 24 others as judges; what is kept is kept in the list `names`."""
    images, labels = pictures(84)
    kept, names = {}, []

    def keep(name, compute, *code, **settings):
        names.append(name)
        return kept.setdefault((name, str(settings)), compute() if (name, str(settings)) not in kept else None)

    judges = {"test": (images[60:], labels[60:]), "validation": (images[60:72], labels[60:72])}
    trials = Trials(images[:60], labels[:60], judges, 3, keep, "noise")
    return trials, torch.arange(60).view(3, 20), names


def test_probes_are_tried_on_every_set_and_pseudo_labels_too(trials):
    trials, sets, _ = trials
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    features = trials.features(encoder, "colours", 60)
    assert [len(part) for part in features.values()] == [60, 24, 12]
    torch.testing.assert_close(features["test"], outputs(encoder, trials.judges["test"][0]))
    mirrored = trials.features(encoder, "colours", 60, mirror=True)
    torch.testing.assert_close(mirrored["pool"], features["pool"])  # a mean colour has no sides
    assert trials.probe(features, 1.0, sets) == [1.0] * 3
    assert trials.self_train(features, 1.0, sets) == [1.0] * 3
    assert trials.best_penalty(features, [0.1, 1.0], sets) == 0.1


def test_trained_networks_are_kept_one_by_one_and_tuning_tries_each_rate_twice(trials):
    trials, sets, names = trials
    recipe = Recipe(2, 0.05, 0.0, batch_size=8)
    first = trials.train("scratch", from_scratch(3), recipe, sets[:2])
    assert trials.train("scratch", from_scratch(3), recipe, sets)[:2] == first
    assert names == ["scratch"] * 5
    way, options = fine_tune(without_head(small_resnet()), 3, C=1.0), with_and_without(recipe, [0.0, 1e-3])
    best, tuned, tried = trials.tune("tuned", way, options, sets[2:], sets[:2])
    assert len(tuned) == 2
    assert list(tried) == ["rate 0", "rate 0, augmented", "rate 0.001", "rate 0.001, augmented"]
    assert sum(tried[next(o for o in options if options[o] == best)]) == max(map(sum, tried.values()))
    only = trials.tune("tuned", way, {"one": recipe}, sets[2:], sets[:2])
    assert (only[0], only[2]) == (recipe, {})  # nothing to choose


def test_grey_images_of_any_number_of_classes_go_all_the_way():
    images = torch.randint(0, 256, (20, 1, 28, 20), dtype=torch.uint8)
    trials = Trials(
        images, torch.arange(20) % 7, {"test": (images, torch.arange(20) % 7)}, 7, lambda n, f, *_, **__: f(), ""
    )
    scores = trials.train("grey", from_scratch(7), Recipe(1, 0.01, 0.0, batch_size=10), torch.arange(20)[None])
    assert 0 <= scores[0] <= 1
