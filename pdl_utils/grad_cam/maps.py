"""Grad-CAM and its relatives: where in the image is the evidence for a class?

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", arXiv:1610.02391; guided backpropagation from Springenberg et al. 2014,
"Striving for Simplicity", arXiv:1412.6806.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pdl_utils.grad_cam.hooks import evaluating, record_activations

Classes = int | Sequence[int] | Tensor | None


@dataclass
class ClassMaps:
    """What `grad_cam` returns for N images and K classes each.

    Attributes:
        maps: layer name → (N, K, h, w), at the layer's own resolution and in the units of score × activation;
            not negative unless `signed` was asked for.
        classes: int64 (N, K), the explained classes.
        logits: (N, number of classes), the scores of the network.
        size: height and width of the images.
    """

    maps: dict[str, Tensor]
    classes: Tensor
    logits: Tensor
    size: tuple[int, int]

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits at the explained classes, (N, K)."""
        return self.logits.softmax(1).gather(1, self.classes)

    def heatmaps(self, layer: str | None = None) -> Tensor:
        """The maps of a layer, of the first if None, ready to lay over the images: (N, K, H, W), each divided by
        its largest absolute value, in 0..1, or -1..1 if signed."""
        return scale_to_one(enlarge(self.maps[layer or next(iter(self.maps))], self.size))


def grad_cam(
    model: nn.Module,
    images: Tensor,
    layers: str | Sequence[str],
    classes: Classes = None,
    *,
    top_k: int = 1,
    signed: bool = False,
) -> ClassMaps:
    """Grad-CAM maps (eqs. 1 and 2) of several classes at several layers, from one forward pass.

    With activations A of a layer and the score y of a class, before the softmax:

        α_k = mean over i, j of ∂y/∂A_kij          map_ij = ReLU(Σ_k α_k A_kij)

    The model runs in eval mode and is left as it was: modes, hooks, `requires_grad`, `.grad`. Works under
    `torch.no_grad()` and `torch.inference_mode()`, and with frozen parameters.

    >>> cam = grad_cam(model, images, ["layer3", "layer4"], top_k=3)
    >>> cam.maps["layer4"].shape                        # ResNet-34 at 224×224
    torch.Size([8, 3, 7, 7])

    Args:
        model: images (N, C, H, W) → class scores (N, number of classes).
        images: floating point, preprocessed as the model wants them.
        layers: names of one or more convolutional layers.
        classes: what to explain: None for each image's `top_k` classes, one class for all images,
            one for each (N,), or several for each (N, K).
        signed: leave out the ReLU. The positive part is then the map, and the negative part, with its
            sign turned, the counterfactual map: what argues against the class (sec. 3.2).

    Raises:
        ValueError: a wrong layer name, class, or shape of the images or of a layer's output.
    """
    names = [layers] if isinstance(layers, str) else list(layers)
    with evaluating(model), record_activations(model, names) as seen:
        logits = model(images.detach().clone())
        classes = choose_classes(logits, classes, top_k)
        activations = [feature_maps(seen, name) for name in names]
        gradients = class_gradients(logits, classes, activations)
    alphas = [gradient.mean((3, 4)) for gradient in gradients]
    sums = [torch.einsum("nkc,nchw->nkhw", a, A.detach()) for a, A in zip(alphas, activations, strict=True)]
    maps = dict(zip(names, sums if signed else [m.relu() for m in sums], strict=True))
    return ClassMaps(maps, classes, logits.detach(), tuple(images.shape[-2:]))


def class_gradients(logits: Tensor, classes: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the scores of `classes`, (N, K), with respect to each of `inputs`, (N, …): (N, K, …)."""
    scores = logits.gather(1, classes).sum(0)  # an image's score depends on no other image
    per_class = [torch.autograd.grad(score, inputs, retain_graph=True) for score in scores]
    return [torch.stack(gradients, 1) for gradients in zip(*per_class, strict=True)]


class GuidedReLU(TorchFunctionMode):
    """While active, gradients flow back through a ReLU only where they are positive (Springenberg et
    al. 2014, sec. 3.4). ReLU's own derivative, zero where its input is negative, stays as it is; no
    module is exchanged, and functional calls are met as well."""

    RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in self.RELUS and output.requires_grad:
            output.register_hook(lambda gradient: gradient.clamp(min=0))
        return output


def guided_backprop(model: nn.Module, images: Tensor, classes: Classes = None, *, top_k: int = 1) -> Tensor:
    """Gradient of class scores with respect to the image, through guided ReLUs: (N, K, C, H, W), for K classes an
    image. Takes what `grad_cam` takes, and leaves the model as that does."""
    with evaluating(model):
        pixels = images.detach().clone().requires_grad_()
        with GuidedReLU():
            logits = model(pixels)
        (gradient,) = class_gradients(logits, choose_classes(logits, classes, top_k), [pixels])
    return gradient


def guided_grad_cam(
    model: nn.Module, images: Tensor, layer: str, classes: Classes = None, *, top_k: int = 1
) -> Tensor:
    """Guided backpropagation times the Grad-CAM map at image size (sec. 3.3): sharp and class-specific,
    (N, K, C, H, W)."""
    cam = grad_cam(model, images, layer, classes, top_k=top_k)
    return guided_backprop(model, images, cam.classes) * enlarge(cam.maps[layer], cam.size).unsqueeze(2)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, K, h, w) at another size, bilinear; pixel areas, not corners, are aligned, so that a map
    cell covers the part of the image that it stands for."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def scale_to_one(maps: Tensor) -> Tensor:
    """Each map (…, h, w) divided by its largest absolute value; a map of zeros stays zeros."""
    peak = maps.abs().amax((-2, -1), keepdim=True)
    return maps / peak.where(peak > 0, 1)


def choose_classes(logits: Tensor, classes: Classes, top_k: int) -> Tensor:
    """The classes to explain as int64 (N, K), checked against the scores of the model."""
    n, count = logits.shape
    if classes is None:
        return logits.topk(top_k).indices
    chosen = torch.as_tensor(classes, device=logits.device)
    chosen = chosen.expand(n) if chosen.ndim == 0 else chosen
    chosen = chosen.unsqueeze(1) if chosen.ndim == 1 else chosen
    if chosen.ndim != 2 or len(chosen) != n or chosen.is_floating_point():
        raise ValueError(f"classes are {classes}; for {n} images give one integer, ({n},) or ({n}, K) of them")
    if ((chosen < 0) | (chosen >= count)).any():
        raise ValueError(f"the model has classes 0 to {count - 1}, and no class {chosen.unique().tolist()}")
    return chosen.long()


def feature_maps(seen: dict[str, Tensor], name: str) -> Tensor:
    """What was recorded of a layer, checked to be feature maps (N, C, h, w) of more than one cell."""
    if name not in seen:
        raise ValueError(f"layer {name!r} takes no part in the forward pass")
    shape = tuple(seen[name].shape)
    if len(shape) != 4 or shape[2:] == (1, 1):
        raise ValueError(
            f"layer {name!r} gives shape {shape}; a map needs (N, C, h, w) with more than one cell: choose an "
            "earlier layer, or larger images"
        )
    return seen[name]
