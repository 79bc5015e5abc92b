"""Grad-CAM: `hooks` read layers, `checks` refuse wrong input, `maps` explain classes, `metrics` test the maps."""

from pdl_utils.grad_cam.hooks import evaluating, record_activations  # noqa: I001 (several names a line)
from pdl_utils.grad_cam.maps import (
    ClassMaps, enlarge, explain_photos, grad_cam, guided_backprop, map_grid, pictures, scale_to_one
)  # fmt: skip
from pdl_utils.grad_cam.metrics import (
    area, box_masks, cascading_randomization, energy_in_box, hottest_overlap, in_words, insertion_deletion,
    mean_interval, pointing_game, randomization_check, rank_correlation, receptive_fields
)  # fmt: skip
