"""Pictures of a run: ranked lists, failures, camera pairs, curves, and sheets of the data.

Every `draw_...` returns a matplotlib Figure; `write_run_figures` draws all that a run's data allow.
"""

from ecn_dist.reporting.pictures.cameras import draw_camera_pairs, weakest_camera_pairs
from ecn_dist.reporting.pictures.canvas import save_figure
from ecn_dist.reporting.pictures.curves import draw_cmc, draw_precision_recall, draw_training_curves
from ecn_dist.reporting.pictures.failures import draw_failures, first_answers
from ecn_dist.reporting.pictures.ranked import Match, RankedList, choose_queries, draw_ranked_lists, ranked_lists
from ecn_dist.reporting.pictures.run import (
    FigureFolder,
    write_data_figures,
    write_run_figures,
    write_training_figure,
)
from ecn_dist.reporting.pictures.sheets import Domain, by_camera, draw_domains, draw_style_copies

__all__ = [
    "Domain",
    "FigureFolder",
    "Match",
    "RankedList",
    "by_camera",
    "choose_queries",
    "draw_camera_pairs",
    "draw_cmc",
    "draw_domains",
    "draw_failures",
    "draw_precision_recall",
    "draw_ranked_lists",
    "draw_style_copies",
    "draw_training_curves",
    "first_answers",
    "ranked_lists",
    "save_figure",
    "weakest_camera_pairs",
    "write_data_figures",
    "write_run_figures",
    "write_training_figure",
]
