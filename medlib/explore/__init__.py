"""Figures and widgets, each with a static twin; see the functions for what to pass and what to try."""

from medlib.explore.anatomy import (
    Draw,
    affine_warp,
    anchor_explorer,
    long_tail_bars,
    neighbour_explorer,
    relation_explorer,
    relation_figure,
    relation_plane,
    warp_explorer,
)
from medlib.explore.curves import LiveCurves, live_curves, training_curves
from medlib.explore.dense import (
    cell_classes,
    cluster_grid,
    correspondence_explorer,
    correspondence_figure,
    decoder_grid,
    neighbour_agreement,
)
from medlib.explore.density import (
    Cloud,
    ClusterScores,
    boundary_bars,
    boundary_distance,
    cloud_figure,
    cluster_scores,
    density_explorer,
    score_curves,
    sparse_places,
)
from medlib.explore.embedding import embedding_explorer, nearest
from medlib.explore.history import align, history_explorer, history_figure, measure_history, project_history
from medlib.explore.losses import loss_explorer, loss_slider
from medlib.explore.measures import direction_alignment, position_probe_error, rank_correlation
from medlib.explore.monitor import TrainingMonitor, training_monitor
from medlib.explore.plane import plane_figure
from medlib.explore.projection import PROJECTIONS, Quality, project, projection_quality
from medlib.explore.recorded import RecordedRun, explore, open_run, record_outcomes, record_phantoms
from medlib.explore.report import check_page
from medlib.explore.results import records_figure
from medlib.explore.show import Explorer, show, show_widget
from medlib.explore.slices import slice_grid, volume_viewer
from medlib.explore.volumes import (
    CT_WINDOWS,
    Agreement,
    agreement,
    linked_planes,
    neighborhood_explorer,
    step_panels,
)

__all__ = [
    "CT_WINDOWS",
    "PROJECTIONS",
    "Agreement",
    "Cloud",
    "ClusterScores",
    "Draw",
    "Explorer",
    "LiveCurves",
    "Quality",
    "RecordedRun",
    "TrainingMonitor",
    "affine_warp",
    "agreement",
    "align",
    "anchor_explorer",
    "boundary_bars",
    "boundary_distance",
    "cell_classes",
    "check_page",
    "cloud_figure",
    "cluster_grid",
    "cluster_scores",
    "correspondence_explorer",
    "correspondence_figure",
    "decoder_grid",
    "density_explorer",
    "direction_alignment",
    "embedding_explorer",
    "explore",
    "history_explorer",
    "history_figure",
    "linked_planes",
    "live_curves",
    "long_tail_bars",
    "loss_explorer",
    "loss_slider",
    "measure_history",
    "nearest",
    "neighborhood_explorer",
    "neighbour_agreement",
    "neighbour_explorer",
    "open_run",
    "plane_figure",
    "position_probe_error",
    "project",
    "project_history",
    "projection_quality",
    "rank_correlation",
    "record_outcomes",
    "record_phantoms",
    "records_figure",
    "relation_explorer",
    "relation_figure",
    "relation_plane",
    "score_curves",
    "show",
    "show_widget",
    "slice_grid",
    "sparse_places",
    "step_panels",
    "training_curves",
    "training_monitor",
    "volume_viewer",
    "warp_explorer",
]
