"""Solvers: functions that walk a posterior down the noise schedule, one file each."""

from .checks import check_finite, check_settings
from .dmap import sample_dmap
from .dps import guided_denoised, sample_dps

__all__ = ["check_finite", "check_settings", "guided_denoised", "sample_dmap", "sample_dps"]
