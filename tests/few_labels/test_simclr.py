"""SimCLR: the loss against lightly's, and pretraining that learns without labels."""

import pytest
import torch
from lightly.loss import NTXentLoss

from pdl_utils.few_labels.simclr import SimCLR, cifar_encoder, knn_accuracy, knn_monitor, nt_xent_loss, pretrain
from pdl_utils.images import Augmentation


@pytest.mark.parametrize(("shape", "temperature"), [((2, 4), 0.5), ((33, 5), 0.1)])
def test_the_loss_and_its_gradient_equal_those_of_lightly(shape, temperature):
    torch.manual_seed(0)
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theirs = [z.detach().clone().requires_grad_() for z in ours]
    loss, peer = nt_xent_loss(*ours, temperature), NTXentLoss(temperature)(*theirs)
    torch.testing.assert_close(loss, peer, rtol=1e-12, atol=0)
    loss.backward()
    peer.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
    for wrong in ((ours[0], ours[1][1:]), (ours[0][:1], ours[1][:1]), (*ours, 0.0)):
        with pytest.raises(ValueError, match=r"two views each of two images or more, .*; the embeddings are"):
            nt_xent_loss(*wrong)


def test_the_loss_is_computed_in_float32_under_autocast():
    z1, z2 = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent_loss(z1, z2, 0.1)
    assert inside.dtype == torch.float32
    assert inside.item() == nt_xent_loss(z1, z2, 0.1).item()


def test_knn_accuracy():
    queries, bank = torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0], [0.6, 0.8], [0.6, 0.8], [0, 1]])
    labels = torch.tensor([0, 1, 1, 1])  # one at cosine 1 outweighs two at 0.6
    assert knn_accuracy(bank, labels, queries, torch.tensor([0]), k=3) == 1
    assert knn_accuracy(bank, labels, torch.tensor([[5.0, 0], [0.2, 3]]), torch.tensor([0, 0]), k=3) == 0.5
    same = torch.ones(3, 2).half()  # exp(10) twice is too large for half precision
    assert knn_accuracy(same, torch.tensor([0, 1, 1]), same[:1], torch.tensor([1])) == 1


def two_kinds(count=64):
    """Reddish noise, and stripes, in turn; which is which."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 2
    stripes = torch.arange(32).remainder(8).ge(4).mul(200).to(torch.uint8).expand(3, 32, 32)
    images[labels == 1] = images[labels == 1] // 8 + stripes
    return images, labels


def train(images, sizes, **options):
    """A small model, pretrained; and its history."""
    torch.manual_seed(0)
    model = SimCLR(*cifar_encoder(16, 2))
    return model, pretrain(model, images, sizes, loss=nt_xent_loss, batch_size=16, label=None, **options)


def test_pretraining_learns_and_a_monitor_measures_it():
    images, labels = two_kinds()
    _, history = train(images, [32] * 4, lr=0.05, evaluate=knn_monitor(images, labels, 40, 24))
    assert history["loss"][-1] < history["loss"][0]
    assert history["knn"][-1] > 0.9
    with pytest.raises(ValueError, match="a bank of 40 and 25 queries need as many images, not 64"):
        knn_monitor(images, labels, 40, 25)


def test_views_without_augmentation_are_equal_and_the_loss_says_so():
    images, _ = two_kinds(32)
    _, same = train(images, [32], lr=1e-9, augment=Augmentation())
    _, views = train(images, [32], lr=1e-9)
    assert same["loss"] < views["loss"]
