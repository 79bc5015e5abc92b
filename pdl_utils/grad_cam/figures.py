"""Maps laid over their photographs, in rows."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pdl_utils.grad_cam.maps import enlarge, scale_to_one
from pdl_utils.plots import image_grid, overlay, to_pixels

Row = tuple[Tensor, Sequence[Tensor], Sequence[str]]  # a photograph, its maps, and a title for each of these


def pictures(photo: Tensor, maps: Sequence[Tensor], signed: bool = False) -> list[np.ndarray]:
    """A photograph (3, H, W), then each map (h, w) enlarged, divided by its largest value and laid over it."""
    heats = [scale_to_one(enlarge(cells[None, None], photo.shape[-2:]))[0, 0] for cells in maps]
    return [to_pixels(photo), *(overlay(photo, heat, signed) for heat in heats)]


def map_grid(rows: Sequence[Row], columns: int, *, signed: bool = False, cell: float = 1.9) -> Figure:
    """The `pictures` of all rows with their titles, `columns` in a line, `cell` inches wide."""
    tiles = [tile for photo, maps, _ in rows for tile in pictures(photo, maps, signed)]
    titles = [title for *_, texts in rows for title in texts]
    return image_grid(tiles, titles, columns=columns, cell=cell)
