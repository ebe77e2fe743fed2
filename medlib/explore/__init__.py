"""Figures and widgets, each with a static twin; see the functions for what to pass and what to try."""

from medlib.explore.curves import LiveCurves, live_curves, training_curves
from medlib.explore.dense import (
    cell_classes,
    cluster_grid,
    correspondence_explorer,
    correspondence_figure,
    decoder_grid,
    neighbour_agreement,
)
from medlib.explore.embedding import embedding_explorer, nearest, project
from medlib.explore.losses import loss_explorer, loss_slider
from medlib.explore.measures import direction_alignment, position_probe_error, rank_correlation
from medlib.explore.plane import plane_figure
from medlib.explore.report import check_page
from medlib.explore.results import records_figure
from medlib.explore.show import Explorer, show, show_widget
from medlib.explore.slices import slice_grid, volume_viewer

__all__ = [
    "Explorer",
    "LiveCurves",
    "cell_classes",
    "check_page",
    "cluster_grid",
    "correspondence_explorer",
    "correspondence_figure",
    "decoder_grid",
    "direction_alignment",
    "embedding_explorer",
    "live_curves",
    "loss_explorer",
    "loss_slider",
    "nearest",
    "neighbour_agreement",
    "plane_figure",
    "position_probe_error",
    "project",
    "rank_correlation",
    "records_figure",
    "show",
    "show_widget",
    "slice_grid",
    "training_curves",
    "volume_viewer",
]
