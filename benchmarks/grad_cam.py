"""Grad-CAM side by side: this package, torch-cam, captum, pytorch-grad-cam, and one plain forward pass.

    python benchmarks/grad_cam.py [--rounds 7] [--json FILE]

ResNet-34 with random weights (they do not matter for time), 8×3×224×224, float32. All contestants run in turn,
round after round, so that a busy moment of the machine meets them all; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.models import resnet34

from pdl_utils.grad_cam import grad_cam
from pdl_utils.provenance import device_name
from pdl_utils.settings import pick_device, save_atomically, seed_everything

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
TOP_K = 3


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
    for title, layers in (("layer4", ["layer4"]), ("layer1–4", LAYERS)):
        calls[f"{title}: ours"] = lambda layers=layers: grad_cam(model, images, layers, top_k=TOP_K)
        for peer in (torchcam, captum, pytorch_grad_cam):
            calls[f"{title}: {peer.__name__}"] = lambda peer=peer, layers=layers: peer(layers)
    return calls


def measure(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median, least and largest of the ratios of two calls within a round."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*backward hooks.*|.*did not already require.*")
    device = pick_device()
    seed_everything(0)
    model = resnet34().to(device).eval()
    seconds = measure(contestants(model, torch.randn(8, 3, 224, 224, device=device)), args.rounds, device)

    plain = seconds["plain forward pass"]
    report = {"device": device_name(device), "torch": torch.__version__, "rounds": args.rounds, "ratios": {}}
    print(f"{report['device']}, torch {torch.__version__}; top-{TOP_K} classes of 8 images of 224×224, ResNet-34")
    print(f"plain forward pass: {statistics.median(plain) * 1000:.0f} ms\n")
    print(f"{'ratio of times':44} median  (range)")
    for task in ("layer4", "layer1–4"):
        ours = seconds[f"{task}: ours"]
        pairs = {f"{task}: ours / plain forward pass": (ours, plain)}
        pairs[f"{task}: ours / torchcam"] = (ours, seconds[f"{task}: torchcam"])
        for peer in ("captum", "pytorch_grad_cam"):
            pairs[f"{task}: {peer} / ours"] = (seconds[f"{task}: {peer}"], ours)
        for name, (above, below) in pairs.items():
            report["ratios"][name] = r = ratio(above, below)
            print(f"{name:44} {r['median']:6.2f}  ({r['min']:.2f}–{r['max']:.2f})")
    if args.json:
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        save_atomically(lambda partial: partial.write_text(text, encoding="utf-8"), args.json)


if __name__ == "__main__":
    main()
