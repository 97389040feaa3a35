"""What messages call an operator: its node, not its class."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

NODES = {
    "SuperResolution": "Operator: Super-Resolution",
    "GaussianBlur": "Operator: Gaussian Blur",
    "MotionBlur": "Operator: Motion Blur",
    "KernelBlur": "Operator: Kernel Blur",
    "NonlinearBlur": "Operator: Nonlinear Blur",
    "Inpainting": "Operator: Inpainting",
    "Grayscale": "Operator: Grayscale",
    "Jpeg": "Operator: JPEG",
    "Segmentation": "Operator: Segmentation",
    "Compose": "Operator: Compose",
    "Noisy": "Operator: Known Noise",
}
_NAMED = re.compile(rf"(?<!Operator: )\b({'|'.join(NODES)}): ")


@contextmanager
def speaking_of_nodes(name: str = "") -> Iterator[None]:
    """ValueErrors of dmap_core in the context name nodes where they name operators' classes, and begin with `name`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(name + _NAMED.sub(lambda found: f"{NODES[found[1]]}: ", str(error))) from error
