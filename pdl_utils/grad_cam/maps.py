"""Where in the image is the evidence for a class? Grad-CAM: Selvaraju et al. 2017, arXiv:1610.02391. Guided
backpropagation: Springenberg et al. 2014, "Striving for Simplicity", arXiv:1412.6806."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pdl_utils.grad_cam import checks
from pdl_utils.grad_cam.checks import Classes
from pdl_utils.grad_cam.hooks import evaluating, record_activations
from pdl_utils.images import resize
from pdl_utils.plots import image_grid, overlay, to_pixels
from pdl_utils.resnet import PretrainedNetwork

Row = tuple[Tensor, Sequence[Tensor], Sequence[str]]  # a photograph, its maps, and a title for each of these


@dataclass
class ClassMaps:
    """What `grad_cam` returns for N images and K classes each."""

    maps: dict[str, Tensor]  # layer → (N, K, h, w), at the layer's own resolution, in units of score × activation
    classes: Tensor  # int64 (N, K)
    logits: Tensor  # (N, C), the network's scores
    size: tuple[int, int]  # height and width of the images

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits at the explained classes, (N, K); ValueError for a network with one logit."""
        return checks.probabilities(self.logits, self.classes)

    def heatmaps(self, layer: str | None = None) -> Tensor:
        """The maps of a layer, of the first if None, to lay over the images: (N, K, H, W), each divided by its
        largest absolute value."""
        return scale_to_one(enlarge(self.maps[layer or next(iter(self.maps))], self.size))


def grad_cam(
    model: nn.Module, images: Tensor, layers: str | Sequence[str], classes: Classes = None, *, top_k: int = 1,
    signed: bool = False, channels_last: bool | None = None,
) -> ClassMaps:  # fmt: skip
    """Grad-CAM maps of several classes at several layers, from one forward pass in eval mode; the model is left as
    it was. With activations A of a layer and the score y of a class (equations 1 and 2):

        α_k = mean over i, j of ∂y/∂A_kij          map_ij = ReLU(Σ_k α_k A_kij)

    Args:
        images: floats (N, C, H, W), preprocessed for the network, which gives scores (N, number of classes).
        layers: names as in `model.named_modules()`.
        classes: None for each image's `top_k`, one for all images, one for each (N,), or several (N, K): numbers,
            or names where the model has `categories`, as those of `pretrained_resnet` do.
        signed: leave out the ReLU; what is negative argues against the class.
        channels_last: True: the layers give (N, h, w, C), as in Swin. None: (N, C, h, w) in the proportions of the
            images; False: (N, C, h, w) of any.
    """
    with evaluating(model), record_activations(model, layers) as seen:
        logits, size = checks.class_scores(model, checks.float_batch(images)), tuple(images.shape[-2:])
        classes = checks.choose_classes(logits, classes, top_k, getattr(model, "categories", ()))
        activations = checks.feature_maps(seen, model, images.shape, channels_last)
        gradients = class_gradients(logits, classes, activations)
    maps = {}
    for name, activation in activations.items():
        activation, gradient = activation.detach(), gradients[name]
        if channels_last:
            activation, gradient = activation.movedim(-1, 1), gradient.movedim(-1, 2)
        alpha = gradient.mean((3, 4))  # (N, K, channels), equation 1
        summed = torch.einsum("nkc,nchw->nkhw", alpha, activation)  # equation 2, but for the ReLU
        maps[name] = checks.finite(summed if signed else summed.relu(), f"the map of {name!r}")
    return ClassMaps(maps, classes, logits.detach(), size)


def explain_photos(
    network: PretrainedNetwork, photos: Tensor, layers: str | Sequence[str], classes: Tensor, **options: bool
) -> ClassMaps:
    """`grad_cam` of any number of uint8 (N, 3, H, W), 32 at a time, resized to the network's `size` (of the
    shorter side); what it gives is on the CPU."""
    parts = []
    for some, asked in zip(photos.split(32), classes.split(32), strict=True):
        images = network.preprocess(resize(some, network.size))
        parts.append(grad_cam(network.model, images, layers, asked, **options))
    maps = {name: torch.cat([part.maps[name] for part in parts]).cpu() for name in parts[0].maps}
    chosen, logits = torch.cat([part.classes for part in parts]), torch.cat([part.logits for part in parts])
    return ClassMaps(maps, chosen.cpu(), logits.cpu(), parts[0].size)


def class_gradients(logits: Tensor, classes: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the scores of `classes`, (N, K), with respect to `inputs`, name → (N, …): name → (N, K, …).
    ValueError: no gradient reaches one of them."""
    scores = logits.gather(1, classes).sum(0)  # (K,); an image's score depends on no other image
    tensors, lost = list(inputs.values()), list(inputs)
    if scores.requires_grad:
        rows = [torch.autograd.grad(score, tensors, retain_graph=True, allow_unused=True) for score in scores]
        lost = [name for name, gradient in zip(inputs, rows[0], strict=True) if gradient is None]
    if lost:
        raise ValueError(
            f"no gradient leads from the scores to {', '.join(lost)}: they do not depend on it, or the forward "
            "pass cuts the way (detach, no_grad, .data, NumPy)"
        )
    columns = zip(*rows, strict=True)  # of one input each, the gradients of K scores
    return {name: torch.stack(column, 1) for name, column in zip(inputs, columns, strict=True)}


class GuidedReLU(TorchFunctionMode):
    """While active, gradients flow back through a ReLU, module or function, only where they are positive
    (Springenberg et al. 2014). `met` counts these."""

    RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
    met = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in self.RELUS and output.requires_grad:
            self.met += 1
            output.register_hook(lambda gradient: gradient.clamp(min=0))
        return output


def guided_backprop(model: nn.Module, images: Tensor, classes: Classes = None, *, top_k: int = 1) -> Tensor:
    """Gradient of class scores with respect to the images, through guided ReLUs: (N, K, C, H, W). Takes what
    `grad_cam` takes. ValueError: the network has no ReLU, and this would be the plain gradient."""
    with evaluating(model):
        pixels = checks.float_batch(images).requires_grad_()
        with GuidedReLU() as relus:
            logits = checks.class_scores(model, pixels)
        if not relus.met:
            raise ValueError("guided backpropagation needs ReLUs, and this network's forward pass runs none")
        classes = checks.choose_classes(logits, classes, top_k, getattr(model, "categories", ()))
        return checks.finite(class_gradients(logits, classes, {"images": pixels})["images"], "the gradient")


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (N, K, h, w) at another size, bilinear; a map cell covers the part of the image that it stands for."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def scale_to_one(maps: Tensor) -> Tensor:
    """Each map (…, h, w) divided by its largest absolute value; a map of zeros stays zeros."""
    peak = checks.finite(maps, "maps").abs().amax((-2, -1), keepdim=True)
    return maps / peak.where(peak > 0, 1)


def pictures(photo: Tensor, maps: Sequence[Tensor], signed: bool = False) -> list[np.ndarray]:
    """A photograph (3, H, W), then each map (h, w) enlarged, divided by its largest value and laid over it."""
    heats = [scale_to_one(enlarge(cells[None, None], photo.shape[-2:]))[0, 0] for cells in maps]
    return [to_pixels(photo), *(overlay(photo, heat, signed) for heat in heats)]


def map_grid(rows: Sequence[Row], columns: int, *, signed: bool = False, cell: float = 1.9) -> Figure:
    """The `pictures` of all rows with their titles, `columns` in a line, `cell` inches wide."""
    tiles = [tile for photo, maps, _ in rows for tile in pictures(photo, maps, signed)]
    titles = [title for *_, texts in rows for title in texts]
    return image_grid(tiles, titles, columns=columns, cell=cell)
