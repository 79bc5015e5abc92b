"""Ours beside the peers: prints what docs/benchmarks.md holds.

    python benchmarks/run.py [--rounds 7] [--threads 1] [graphs] [maps] [simclr] [lora]

Ours and the others take turns, every other round backwards, and ratios of times are taken within a round, so that
a busy moment of the machine meets both. Weights and inputs are the same on both sides, and the outputs are
compared first. torch.utils.benchmark takes the time: with a set number of threads, and waiting for a GPU.
"""

import argparse
import copy
import itertools
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch_geometric.nn
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch_geometric.utils import coalesce, remove_self_loops
from torchvision.models import resnet34
from torchvision.transforms import v2

from pdl_utils.few_labels.lora import add_lora, merge_lora
from pdl_utils.few_labels.simclr import VIEW, SimCLR, cifar_encoder, nt_xent_loss
from pdl_utils.grad_cam import grad_cam
from pdl_utils.graphs import layers as graph_layers
from pdl_utils.images import normalize
from pdl_utils.settings import device_name, pick_device

Calls = Mapping[str, Callable[[], object]]
DEVICE = pick_device()
NODES, DEGREE, HEADS, CHANNELS = 2373, 29, 4, 256  # of a PPI graph, on average; of a layer for it
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def compare(what: str, calls: Calls, rounds: int) -> None:
    """Print a row for each call after the first, which is ours: the median and range of ratios, and both times."""
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(timers)[:: -1 if number % 2 else 1]:
            seconds[name].append(timers[name].timeit(1).mean)  # after two calls that warm up
    ours, *others = seconds
    for other in others:
        ratios = [a / b for a, b in zip(seconds[ours], seconds[other], strict=True)]
        times = " · ".join(milliseconds(statistics.median(seconds[name])) for name in (ours, other))
        middle = statistics.median(ratios)
        print(f"| {what} | {other} | {middle:.2f} | {min(ratios):.2f}–{max(ratios):.2f} | {times} |", flush=True)


def head(title: str) -> None:
    print(f"\n## {title}\n\n| what | beside | ours / theirs | range | ms |\n|---|---|---|---|---|")


def layers_and_graph(name: str, in_channels: int) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """Our layer and PyG's with the same weights, and two graphs of PPI's size, joined: x (2·NODES, inputs)."""
    torch.manual_seed(0)
    one = torch.randint(0, NODES, (2, NODES * DEGREE))
    edge_index, _ = remove_self_loops(coalesce(torch.cat([one, one.flip(1) + NODES], dim=1)))
    modules = {"ours": graph_layers, "PyG": torch_geometric.nn}
    layers = {who: getattr(module, f"{name}Conv")(in_channels, CHANNELS, HEADS) for who, module in modules.items()}
    layers["ours"].load_state_dict(layers["PyG"].state_dict())
    x = torch.randn(2 * NODES, in_channels, device=DEVICE, requires_grad=True)
    return {who: layer.to(DEVICE) for who, layer in layers.items()}, x, edge_index.to(DEVICE)


def step(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """A forward and a backward pass."""
    layer.zero_grad()
    out = layer(*inputs)
    out.square().mean().backward()
    return out.detach()


def peak(name: str, who: str) -> float:
    """How far one step raises a fresh process's (or the GPU's) peak of memory, in MB."""
    layers, *inputs = layers_and_graph(name, 1024)

    def highest() -> float:
        if DEVICE.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**20

    before = highest()
    step(layers[who], *inputs)
    return highest() - before


def graphs(rounds: int) -> None:
    head("Graph attention: a step of one layer, 4 heads of 256, on two graphs of PPI's size")
    names = ("GAT", "GATv2")
    for name in names:  # first, since a process begins with the peak of the one that started it
        command = [sys.executable, __file__, "--peak", name]
        ours, theirs = (float(subprocess.check_output([*command, who])) for who in ("ours", "PyG"))
        print(f"| {name}, 1024 in: peak memory | PyG | {ours / theirs:.2f} | | {ours:.0f} · {theirs:.0f} MB |")
    for name, in_channels in itertools.product(names, (1024, 50)):
        layers, *inputs = layers_and_graph(name, in_channels)
        torch.testing.assert_close(*(step(layer, *inputs) for layer in layers.values()), rtol=1e-4, atol=1e-5)
        calls = {who: partial(step, layer, *inputs) for who, layer in layers.items()}
        compare(f"{name}, {in_channels} in", calls, rounds)


def maps(rounds: int) -> None:
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import GradCAM as TorchCam

    head("Grad-CAM: the three best classes of four images of 224×224, ResNet-34, layer4")
    warnings.filterwarnings("ignore", message=".*backward hooks.*|.*did not already require.*")
    torch.manual_seed(0)
    model, images = resnet34().to(DEVICE).eval(), torch.randn(4, 3, 224, 224, device=DEVICE)
    classes = model(images).topk(3).indices.T  # (3, 4)

    def torchcam() -> None:
        with TorchCam(model, "layer4") as extractor:
            scores = model(images)
            for k, chosen in enumerate(classes):
                extractor(chosen.tolist(), scores, retain_graph=k < 2)

    def captum() -> None:
        explain = LayerGradCam(model, model.layer4)
        for chosen in classes:
            explain.attribute(images, chosen, relu_attributions=True)

    def pytorch_grad_cam() -> None:
        with GradCAM(model, [model.layer4]) as explain:
            for chosen in classes:
                explain(images, [ClassifierOutputTarget(int(c)) for c in chosen])

    calls = {
        "ours": lambda: grad_cam(model, images, "layer4", top_k=3), "torch-cam": torchcam, "captum": captum,
        "pytorch-grad-cam": pytorch_grad_cam, "one plain forward pass": torch.no_grad()(partial(model, images)),
    }  # fmt: skip
    compare("maps", calls, rounds)


def simclr(rounds: int) -> None:
    from lightly.loss import NTXentLoss

    head("SimCLR: 256 images of 32×32, the encoder that ships")
    torch.manual_seed(0)
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    crop, colors = v2.RandomResizedCrop(32, scale=(0.2, 1.0)), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    colors = v2.RandomApply([colors], p=0.8)
    one_by_one = v2.Compose([crop, v2.RandomHorizontalFlip(), colors, v2.RandomGrayscale(0.2)])
    calls = {"ours": lambda: VIEW(images), "torchvision, image by image": lambda: [one_by_one(i) for i in images]}
    compare("views", calls, rounds)

    z = torch.randn(2, 256, 128, device=DEVICE, requires_grad=True)
    peer = NTXentLoss(temperature=0.2)
    torch.testing.assert_close(nt_xent_loss(*z, 0.2), peer(*z))
    calls = {"ours": lambda: nt_xent_loss(*z, 0.2).backward(), "lightly": lambda: peer(*z).backward()}
    compare("loss and its gradient", calls, 5 * rounds)

    ours = SimCLR(*cifar_encoder(width=32, stem_stride=2)).to(DEVICE, memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)

    def our_step() -> None:
        nt_xent_loss(*ours(normalize(torch.cat([VIEW(images), VIEW(images)]))).chunk(2), 0.2).backward()

    def peer_step() -> None:  # as in its tutorials, one view after the other
        views = [normalize(torch.stack([one_by_one(i) for i in images])) for _ in range(2)]
        peer(*(theirs(view) for view in views)).backward()

    compare("a training step with its views", {"ours": our_step, "lightly's": peer_step}, rounds)


def lora(rounds: int) -> None:
    import peft

    head("LoRA, rank 8: a training step, and inference after merging")
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 5))
    first, second = (nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2))
    kernels = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
    for what, plain, shape in (("MLP", linear, (128, 784)), ("two 3×3 convolutions", kernels, (16, 64, 16, 16))):
        plain, x = plain.to(DEVICE), torch.randn(shape, device=DEVICE)
        ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
        names = add_lora(ours, 8, 12)
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=12, target_modules=names), theirs)
        for name in names:  # the same A and B, none of them zero
            update, peer = ours.get_submodule(name), theirs.get_submodule(name)
            nn.init.normal_(update.B.weight, std=0.01)
            peer.lora_A["default"].load_state_dict(update.A.state_dict())
            peer.lora_B["default"].load_state_dict(update.B.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        networks = {"ours": ours, "peft": theirs, "the plain network learning": copy.deepcopy(plain)}
        compare(f"{what}, step", {who: partial(step, net, x) for who, net in networks.items()}, 5 * rounds)
        merge_lora(ours)
        networks = {"ours": ours, "the plain network": plain}
        calls = {who: torch.no_grad()(partial(net, x)) for who, net in networks.items()}
        compare(f"{what}, merged", calls, 5 * rounds)


PARTS = {part.__name__: part for part in (graphs, maps, simclr, lora)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of the benchmarks; all if none is named")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(*args.peak))
        return
    capability = f" with {torch.backends.cpu.get_cpu_capability()}" if DEVICE.type == "cpu" else ""
    print(f"{device_name(DEVICE)}{capability}, torch {torch.__version__}; medians of {args.rounds} rounds or more")
    for name in args.parts or PARTS:
        PARTS[name](args.rounds)


if __name__ == "__main__":
    main()
