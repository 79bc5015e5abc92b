"""Grad-CAM: `hooks` read layers, `checks` refuse wrong input, `maps` explain classes, `figures` draw
the maps, `metrics` test them."""

from pdl_utils.grad_cam.figures import map_grid, pictures
from pdl_utils.grad_cam.hooks import evaluating, record_activations
from pdl_utils.grad_cam.maps import (
    ClassMaps,
    GuidedReLU,
    class_gradients,
    enlarge,
    explain_photos,
    grad_cam,
    guided_backprop,
    guided_grad_cam,
    scale_to_one,
)
from pdl_utils.grad_cam.metrics import (
    area,
    box_masks,
    cascading_randomization,
    energy_in_box,
    hottest_overlap,
    in_words,
    insertion_deletion,
    mean_interval,
    pointing_game,
    randomization_check,
    rank_correlation,
    receptive_fields,
)
