"""One line for every restoration of a fixed set, with a hash of its picture: what a change of structure must leave as it is.

    python tools/fingerprints.py > before.txt

One held-out picture at 64x64 by the demo prior on diffusers' networks, fp32, one thread, seed 7, six steps: every solver, several operators, and with
DPS and DMAP every memory plan. Hashes compare on one machine only: another CPU rounds in another way. Four minutes of one core.
"""

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from host import import_torchvision  # noqa: E402

import_torchvision()  # which diffusers asks for

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from dmap_core import solvers  # noqa: E402
from dmap_core.backends.diffusers_files import open_base  # noqa: E402
from dmap_core.gradient import STRATEGIES  # noqa: E402
from dmap_core.operators import Compose, GaussianBlur, Grayscale, Inpainting, Jpeg, MotionBlur, Noisy, SuperResolution, centred_box  # noqa: E402
from dmap_core.restore import restore  # noqa: E402
from dmap_core.schedule import exponential_sigmas  # noqa: E402

SIDE, SEED, STEPS = 64, 7, 6
OPERATORS = (
    SuperResolution(4),
    GaussianBlur(61, 3.0),
    MotionBlur(21.0, 30.0),
    Inpainting(centred_box((SIDE, SIDE), (24, 24))),
    Jpeg(10),
    Compose([GaussianBlur(61, 2.0), SuperResolution(2), Grayscale()]),
    Noisy(SuperResolution(4), 0.1),
)
SOLVERS = (
    solvers.DPS(zeta=2.0),
    solvers.DPS(zeta=0.02, optimizer="adam", eta=0.5),
    solvers.DMAP(zeta=4.0, K=2),
    solvers.DSG(zeta=0.4),
    solvers.PSLD(zeta=2.0, gamma=0.04),
    solvers.PSLD(zeta=2.0, gamma=0.04, transpose="published"),
    solvers.FreeDoM(zeta=1.0, K=2, first=1, last=3),
    solvers.ReSample(zeta=1.0, first=1, last=5, every=2, iterations=3, learning_rate=0.01),
    solvers.LATINO(eta=0.5),
    solvers.FlowDPS(eta=0.5),
    solvers.FlowDPS(weight="falling", noise="falling"),
    solvers.DAPS(iterations=2),
    solvers.DAPS(move="gradient", space="both", ode=2, momentum=0.3, eta=0.5, iterations=2),
)


def picture() -> torch.Tensor:
    path = ROOT / "demo" / "held-out" / "dmap-demo-00.png"
    pixels = np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def main() -> None:
    torch.set_num_threads(1)
    base = open_base(ROOT / "models" / "checkpoints" / "dmap-demo-prior.safetensors")
    prior, sigmas, image = base.sized((SIDE, SIDE)), exponential_sigmas(base.sigmas, STEPS), picture()
    for operator in OPERATORS:
        y = operator.measure(image)
        for solver in SOLVERS:
            if solver.name() == "PSLD" and not operator.linear:
                continue
            for memory in STRATEGIES if solver.name() in ("DPS", "DMAP") else ("fast",):
                found = restore(prior, operator, y, prior.latent_shape(), sigmas, solver, [SEED], memory)
                digest = hashlib.sha256(found.image.numpy().tobytes()).hexdigest()[:16]
                print(operator.describe()[:60], solver.describe(), memory, found.denoiser_calls, found.decoder_calls, digest, flush=True)


if __name__ == "__main__":
    main()
