"""Solvers: functions that walk a posterior down the noise schedule, one file each."""

from .checks import check_finite, check_settings
from .dmap import sample_dmap
from .dps import guided_denoised, sample_dps
from .dsg import sample_dsg
from .freedom import sample_freedom
from .psld import sample_psld
from .resample import sample_resample

SOLVERS = {
    "DPS": sample_dps,
    "PSLD": sample_psld,
    "FreeDoM": sample_freedom,
    "ReSample": sample_resample,
    "DSG": sample_dsg,
    "DMAP": sample_dmap,
}

__all__ = ["SOLVERS", "check_finite", "check_settings", "guided_denoised", *sorted(f.__name__ for f in SOLVERS.values())]
