"""Grad-CAM: `hooks` read layers, `maps` explain classes, `metrics` test the explanations."""

from pdl_utils.grad_cam.hooks import evaluating, record_activations
from pdl_utils.grad_cam.maps import (
    ClassMaps,
    GuidedReLU,
    class_gradients,
    enlarge,
    grad_cam,
    guided_backprop,
    guided_grad_cam,
    scale_to_one,
)
from pdl_utils.grad_cam.metrics import (
    PixelCurves,
    box_masks,
    cascading_randomization,
    energy_in_box,
    insertion_deletion,
    match_classes,
    mean_interval,
    pointing_game,
    randomization_check,
    rank_correlation,
    receptive_fields,
    score_boxes,
)
