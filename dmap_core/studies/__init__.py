"""The paper's studies: its three observations about DPS (Sec. 3.2 to 3.4), the toy example (A.4), and pictures of their results.

`score` and `diversity` compute, `toy` samples, and `plots` draws with matplotlib, which is imported only there, when something is drawn.
"""

from .diversity import Diversity
from .score import UNCONDITIONAL, ScoreErrors, ScoreMean, ScorePoint, plain_score_mean, score_errors, score_means, score_points, timesteps
from .spread import Spread
from .toy import BIMODAL_Y, PUBLISHED_Y, Toy, toy_example

__all__ = [
    "BIMODAL_Y",
    "PUBLISHED_Y",
    "UNCONDITIONAL",
    "Diversity",
    "ScoreErrors",
    "ScoreMean",
    "ScorePoint",
    "Spread",
    "Toy",
    "plain_score_mean",
    "score_errors",
    "score_means",
    "score_points",
    "timesteps",
    "toy_example",
]
