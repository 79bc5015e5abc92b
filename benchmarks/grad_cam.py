"""Grad-CAM beside torch-cam, captum, pytorch-grad-cam, and one plain forward pass.

    python benchmarks/grad_cam.py [--rounds 4] [--json FILE]

Maps of the three best classes of a batch of images, ResNet-34 with random weights (they do not matter for time),
float32, at the last stage and at all four. Ours and torch-cam explain all classes after one forward pass;
captum and pytorch-grad-cam run a forward and a backward pass for each class and layer, which explains most of
their time. One plain forward pass is the limit for the last stage, and no limit for four: their gradients need
a backward pass through most of the network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from side_by_side import LIMIT, arguments, measure, report
from torchvision.models import resnet34

from pdl_utils.grad_cam import grad_cam
from pdl_utils.settings import pick_device, seed_everything

TASKS = {"layer4": ["layer4"], "layer1–4": ["layer1", "layer2", "layer3", "layer4"]}
BATCH, TOP_K = 4, 3
PEERS = ("torch-cam", "captum", "pytorch-grad-cam")


def contestants(model: torch.nn.Module, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Name → a call that makes the maps of the top-3 classes of every image at one layer or at four."""
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import GradCAM as TorchCam

    def plain():
        with torch.no_grad():
            return model(images)

    top = plain().topk(TOP_K).indices

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
    for task, layers in TASKS.items():
        calls[f"{task}: ours"] = lambda layers=layers: grad_cam(model, images, layers, top_k=TOP_K)
        for name, peer in zip(PEERS, (torchcam, captum, pytorch_grad_cam), strict=True):
            calls[f"{task}: {name}"] = lambda peer=peer, layers=layers: peer(layers)
    return calls


def main() -> None:
    args = arguments(__doc__, rounds=4)
    warnings.filterwarnings("ignore", message=".*backward hooks.*|.*did not already require.*")
    device = pick_device()
    seed_everything(0)
    model = resnet34().to(device).eval()
    images = torch.randn(BATCH, 3, 224, 224, device=device)
    seconds = measure(contestants(model, images), args.rounds, budget=120)
    pairs: dict[str, tuple[list[float], list[float]]] = {}
    for task in TASKS:
        ours = seconds[f"{task}: ours"]
        for peer in PEERS:
            pairs[f"{task}: ours / {peer}"] = (ours, seconds[f"{task}: {peer}"])
        pairs[f"{task}: ours / one plain forward pass {LIMIT}"] = (ours, seconds["plain forward pass"])
    report(f"Grad-CAM, top {TOP_K} classes of {BATCH} images of 224×224, ResNet-34", pairs, device, args.json)


if __name__ == "__main__":
    main()
