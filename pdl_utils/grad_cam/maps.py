"""Grad-CAM and its relatives: where in the image is the evidence for a class?

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", arXiv:1610.02391; guided backpropagation from Springenberg et al. 2014,
"Striving for Simplicity", arXiv:1412.6806.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pdl_utils.grad_cam.hooks import Layer, evaluating, find_layers, record_activations

Classes = int | Sequence[int] | Tensor | None


@dataclass
class ClassMaps:
    """What `grad_cam` returns for N images and K classes each.

    Attributes:
        maps: layer name → (N, K, h, w), at the layer's own resolution and in the units of score ×
            activation; not negative unless `signed` was asked for. float32, also out of autocast, and
            float64 for a float64 model.
        classes: int64 (N, K), the explained classes.
        logits: (N, number of classes), the network's scores, of the same type.
    """

    maps: dict[str, Tensor]
    classes: Tensor
    logits: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits at the explained classes, (N, K)."""
        return self.logits.softmax(1).gather(1, self.classes)


def grad_cam(
    model: nn.Module,
    images: Tensor,
    layers: Layer | Sequence[Layer],
    classes: Classes = None,
    *,
    top_k: int = 1,
    signed: bool = False,
) -> ClassMaps:
    """Grad-CAM maps (eqs. 1 and 2) of several classes at several layers, from one forward pass.

    With activations A of a layer and the score y of a class, before the softmax:

        α_k = mean over i, j of ∂y/∂A_kij          map_ij = ReLU(Σ_k α_k A_kij)

    The model is evaluated in eval mode and left as it was: modes, hooks, parameter `.grad`. Works
    under `torch.no_grad()`, with frozen parameters, in autocast and in any memory format.

    >>> cam = grad_cam(model, images, ["layer3", "layer4"], top_k=3)
    >>> cam.maps["layer4"].shape                        # ResNet-34 at 224×224
    torch.Size([8, 3, 7, 7])

    Args:
        model: images (N, C, H, W) → class scores (N, number of classes).
        images: floating point, preprocessed as the model wants them.
        layers: one or more convolutional layers, by name or as modules.
        classes: what to explain: None for each image's `top_k` classes, one class for all images,
            one for each (N,), or several for each (N, K).
        signed: leave out the ReLU. The positive part is then the map, and the negative part, with its
            sign turned, the counterfactual map: what argues against the class (sec. 3.2).

    Raises:
        ValueError: a wrong layer name, class, number of classes, shape of the images or of a layer's output.
    """
    check_images(model, images)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        images = images.clone() if images.is_inference() else images
        with record_activations(model, layers, start_graph=True) as seen:
            logits = model(images)
            classes = choose_classes(logits, classes, top_k)
            activations = feature_maps(seen, find_layers(model, layers), images)
            gradients = class_gradients(logits, classes, list(activations.values()))
        maps = {
            name: weighted_sum(activation, gradient)
            for (name, activation), gradient in zip(activations.items(), gradients, strict=True)
        }
    return ClassMaps({n: m if signed else m.relu() for n, m in maps.items()}, classes, at_least_float32(logits))


def class_gradients(logits: Tensor, classes: Tensor, inputs: list[Tensor]) -> Iterator[Tensor]:
    """Gradients of the scores of `classes`, (N, K), with respect to each of `inputs`, (N, …): (N, K, …)."""
    per_class = [
        torch.autograd.grad(score.sum(), inputs, retain_graph=k + 1 < classes.shape[1])
        for k, score in enumerate(logits.gather(1, classes).unbind(1))
    ]
    return (torch.stack(gradients, 1) for gradients in zip(*per_class, strict=True))


def weighted_sum(activation: Tensor, gradients: Tensor) -> Tensor:
    """Σ_k α_k A_k (eqs. 1 and 2 before the ReLU): (N, C, h, w) and (N, K, C, h, w) → (N, K, h, w)."""
    alpha = at_least_float32(gradients).mean((3, 4))
    with torch.autocast(activation.device.type, enabled=False):  # it would round the products again
        return torch.einsum("nkc,nchw->nkhw", alpha, at_least_float32(activation))


def at_least_float32(values: Tensor) -> Tensor:
    """Detached; half precision, from autocast or a half model, widened to float32."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


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
    """Gradient of class scores with respect to the image, through guided ReLUs.

    Takes what `grad_cam` takes, and leaves the model as that does.

    Returns:
        (N, K, C, H, W), for K classes an image.
    """
    check_images(model, images)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        pixels = images.detach().clone().requires_grad_()
        with GuidedReLU():
            logits = model(pixels)
        classes = choose_classes(logits, classes, top_k)
        (gradient,) = class_gradients(logits, classes, [pixels])
    return at_least_float32(gradient)


def guided_grad_cam(
    model: nn.Module, images: Tensor, layer: Layer, classes: Classes = None, *, top_k: int = 1
) -> Tensor:
    """Guided backpropagation times the Grad-CAM map at image size (sec. 3.3): sharp and class-specific.

    Returns:
        (N, K, C, H, W).
    """
    cam = grad_cam(model, images, layer, classes, top_k=top_k)
    (maps,) = cam.maps.values()
    return guided_backprop(model, images, cam.classes) * enlarge(maps, images.shape[-2:]).unsqueeze(2)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, K, h, w) at another size, bilinear; pixel areas, not corners, are aligned, so that a map
    cell covers the part of the image that it stands for."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def scale_to_one(maps: Tensor) -> Tensor:
    """Each map (…, h, w) divided by its largest absolute value; a map of zeros stays zeros."""
    peak = maps.abs().amax((-2, -1), keepdim=True)
    return maps / peak.where(peak > 0, 1)


def choose_classes(logits: Tensor, classes: Classes, top_k: int) -> Tensor:
    """The classes to explain as int64 (N, K), checked against the model's scores."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model returns {what}; class scores of shape (images, classes) are needed")
    n, count = logits.shape
    if classes is None:
        if not 1 <= top_k <= count:
            raise ValueError(f"top_k={top_k}: choose 1 to {count}, the number of classes")
        return logits.topk(top_k).indices
    chosen = torch.as_tensor(classes, device=logits.device)
    if chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(f"classes are {chosen.dtype}; whole numbers are needed")
    if chosen.ndim == 0:
        chosen = chosen.expand(n)
    if chosen.ndim == 1:
        chosen = chosen.unsqueeze(1)
    if chosen.ndim != 2 or len(chosen) != n or chosen.shape[1] == 0:
        given = tuple(torch.as_tensor(classes).shape)
        raise ValueError(f"classes of shape {given} for {n} images: give one class, ({n},) or ({n}, K)")
    outside = chosen[(chosen < 0) | (chosen >= count)]
    if len(outside):
        raise ValueError(f"class {outside[0].item()} is out of range: the model has classes 0 to {count - 1}")
    return chosen.long()


def check_images(model: nn.Module, images: Tensor) -> None:
    """Raise a ValueError unless `images` are a batch that the model's first convolution can take."""
    if images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; a preprocessed float batch "
            "(N, C, H, W) is needed, for one image `image.unsqueeze(0)`"
        )
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and images.shape[1] != first.in_channels:
        raise ValueError(f"images have {images.shape[1]} channels; the model takes {first.in_channels}")


def feature_maps(seen: dict[str, Tensor], layers: Iterable[str], images: Tensor) -> dict[str, Tensor]:
    """The activations in the order in which the layers were asked for.

    Raises:
        ValueError: a layer did not run, or its output has no places to tell apart.
    """
    for name in layers:
        if name not in seen:
            raise ValueError(f"layer {name!r} takes no part in the forward pass")
        if seen[name].ndim != 4:
            raise ValueError(
                f"layer {name!r} gives shape {tuple(seen[name].shape)}, not feature maps (N, C, H, W)"
            )
        if seen[name].shape[-2:] == (1, 1):
            size = "×".join(map(str, images.shape[-2:]))
            raise ValueError(
                f"layer {name!r} has a single cell for {size} images, so nothing to locate; "
                "use larger images or an earlier layer"
            )
    return {name: seen[name] for name in layers}
