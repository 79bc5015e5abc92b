"""Grad-CAM side by side: this package, torch-cam, captum, pytorch-grad-cam, and one plain forward pass.

    python benchmarks/grad_cam.py [--rounds 7] [--json FILE]

ResNet-34 with random weights (they do not matter for time), 8×3×224×224, float32. All contestants run in turn,
round after round, so that a busy moment of the machine meets them all; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import LIMIT, measure, report
from torchvision.models import resnet34

from pdl_utils.grad_cam import grad_cam
from pdl_utils.settings import pick_device, seed_everything

TASKS = {"layer4": ["layer4"], "layer1–4": ["layer1", "layer2", "layer3", "layer4"]}
BATCH, TOP_K = 8, 3


def contestants(model: torch.nn.Module, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Name → a call that makes the maps of the top-3 classes of every image at one layer or at four."""
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import GradCAM as TorchCam

    with torch.no_grad():
        top = model(images).topk(TOP_K).indices

    def plain():
        with torch.no_grad():
            model(images)

    def torchcam(layers):
        with TorchCam(model, layers) as extractor:
            scores = model(images)
            for k in range(TOP_K):
                extractor(top[:, k].tolist(), scores, retain_graph=k + 1 < TOP_K)

    def captum(layers):
        for layer in layers:
            explain = LayerGradCam(model, model.get_submodule(layer))
            for k in range(TOP_K):
                explain.attribute(images, top[:, k], relu_attributions=True)

    def pytorch_grad_cam(layers):
        for layer in layers:  # one map a layer: asked for several, it would average them
            with GradCAM(model, [model.get_submodule(layer)]) as explain:
                for k in range(TOP_K):
                    explain(images, [ClassifierOutputTarget(int(c)) for c in top[:, k]])

    calls: dict[str, Callable[[], object]] = {"plain forward pass": plain}
    peers = {"torch-cam": torchcam, "captum": captum, "pytorch-grad-cam": pytorch_grad_cam}
    for task, layers in TASKS.items():
        calls[f"{task}: ours"] = lambda layers=layers: grad_cam(model, images, layers, top_k=TOP_K)
        for name, peer in peers.items():
            calls[f"{task}: {name}"] = lambda peer=peer, layers=layers: peer(layers)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*backward hooks.*|.*did not already require.*")
    device = pick_device()
    seed_everything(0)
    model = resnet34().to(device).eval()
    images = torch.randn(BATCH, 3, 224, 224, device=device)
    seconds = measure(contestants(model, images), args.rounds)

    plain, pairs = seconds["plain forward pass"], {}
    print(f"plain forward pass: {statistics.median(plain) * 1000:.0f} ms")
    for task in TASKS:
        ours = seconds[f"{task}: ours"]
        for peer in ("torch-cam", "captum", "pytorch-grad-cam"):
            pairs[f"{task}: ours / {peer}"] = (ours, seconds[f"{task}: {peer}"])
        pairs[f"{task}: ours / one plain forward pass {LIMIT}"] = (ours, plain)
    title = f"Grad-CAM, top {TOP_K} classes of {BATCH} images of 224×224, ResNet-34"
    report(title, pairs, device, args.json)


if __name__ == "__main__":
    main()
