"""Half of the digits as a second task: a small network for LoRA to adapt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdl_utils.datasets import LabelledImages
from pdl_utils.training import History, fit, warmup_cosine

Split = tuple[Tensor, Tensor]  # float32 (N, 784), standardised, and int64 (N,) in 0..4


def five_digits(
    data: LabelledImages, first: int, most: int, tests: int, device: torch.device
) -> tuple[Split, Split, Split]:
    """The digits `first` to `first` + 4 for training, validation and testing. The last tenth of the training
    images is held out for validation; of the others at most `most` are trained on, and at most `tests` of the
    test images are used."""
    splits = []
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        mine = (labels >= first) & (labels < first + 5)
        pixels = (images[mine].flatten(1) / 255 - 0.1307) / 0.3081  # MNIST's mean and deviation
        splits.append((pixels.to(device), labels[mine].to(device) - first))
    (x, y), (test_x, test_y) = splits
    held_out = len(x) // 10
    some = min(most, len(x) - held_out)
    return (x[:some], y[:some]), (x[-held_out:], y[-held_out:]), (test_x[:tests], test_y[:tests])


def mlp(seed: int = 0) -> nn.Sequential:
    """784 → 1000 → 2000 → 5, with ReLU between."""
    torch.manual_seed(seed)
    hidden = nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 2000), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(2000, 5))


def train_adam(net: nn.Module, data: Split, *, lr: float, epochs: int, batch_size: int, seed: int = 0) -> History:
    """Train what requires gradients with Adam and one cosine, in float32; leaves `net` in eval mode."""
    x, y = data
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)

    def batches(epoch: int) -> list[Split]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        return [(x[rows], y[rows]) for rows in order[: len(x) // batch_size * batch_size].split(batch_size)]

    steps = epochs * (len(x) // batch_size)
    return fit(
        net, batches, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), optimizer, epochs=epochs,
        scheduler=warmup_cosine(optimizer, steps, steps // 20), progress=False,
    )  # fmt: skip


@torch.no_grad()
def share_right(net: nn.Module, data: Split) -> float:
    """Share of the images whose class has the largest output."""
    return (net(data[0]).argmax(1) == data[1]).float().mean().item()
