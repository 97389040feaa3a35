"""What an uncertainty map is worth: whether the spread of versions says where, and by how much, they are wrong. For docs/research.md.

    python demo/uncertainty.py --n 4 --versions 8        # minutes of one core; goes on where it was cut
    python demo/uncertainty.py --operators inpainting --solver DAPS    # a hole of 48x48, by another solver of DMAPPreset

Restores the last held-out pictures, which no table takes, as DMAP Restore does with quality *look* (DMAPPreset auto, matched), several seeds of each, with
the demo prior on diffusers' networks. Writes output/uncertainty/<solver>.csv; its figures with _drawn leave out the flat ground of the pictures, and
factor_autoencoded has the picture that the autoencoder makes of the truth in its place.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from run import HERE, PRIOR_FILE, ROOT, names
from scipy import ndimage, stats
from torch import Tensor

from dmap_core.files import write_whole
from dmap_core.operators import GaussianBlur, Inpainting, SuperResolution, centred_box
from dmap_core.presets import AUTO

HOLE = centred_box((128, 128), (48, 48))
OPERATORS = {
    "super-resolution-x8": SuperResolution(8),
    "gaussian-deblur": GaussianBlur(61, 3.0),
    "inpainting": Inpainting(HOLE),
}
SMOOTH = 3.0  # standard deviation in pixels of what both are smoothed with before they are compared: a pixel's own error is one draw
LEVEL = 0.9
GROUND = 0.05  # of [-1, 1], what still counts as the colour of the corner


def smooth(power: Tensor, sigma: float = SMOOTH) -> Tensor:
    """A map (H, W) of squares under a Gaussian, reflected at the edges."""
    return torch.from_numpy(ndimage.gaussian_filter(power.numpy(), sigma, mode="mirror", truncate=3.0))


def figures(versions: Tensor, truth: Tensor, where: Tensor | None = None) -> dict[str, float]:
    """Of versions (k, 3, H, W) and their truth (3, H, W) in one unit; where: (H, W) of bool, the pixels that are looked at.

    rank, rank_smooth: Spearman's correlation of the map of deviations with the error of the mean, per pixel and smoothed. factor: the root mean square
    error of the mean over what the deviations say that it is, sqrt(1 + 1 / k) s: 1 for samples of the posterior, above it where the spread is too small; factor_smooth: the
    median over pixels of the same, smoothed. held: the share of values in mean +- t sqrt(1 + 1 / k) s, with Student's t for 90 % (of 8 versions 2.01 s).
    error, deviation: root mean squares.
    """
    k = len(versions)
    mean, variance = versions.mean(0), versions.var(0)
    error = (truth - mean).square()
    due = (1 + 1 / k) * variance
    inside = torch.ones(truth.shape[1:], dtype=torch.bool) if where is None else where
    t = float(stats.t.ppf((1 + LEVEL) / 2, k - 1))
    of_error, of_due = error.mean(0), due.mean(0)
    smoothed = smooth(of_error)[inside], smooth(of_due)[inside]
    return {
        "rank": float(stats.spearmanr(of_due[inside], of_error[inside]).statistic),
        "rank_smooth": float(stats.spearmanr(smoothed[1], smoothed[0]).statistic),
        "factor": float((of_error[inside].mean() / of_due[inside].mean()).sqrt()),
        "factor_smooth": float((smoothed[0] / smoothed[1]).sqrt().median()),
        "held": float((error <= t**2 * due)[:, inside].double().mean()),
        "error": float(of_error[inside].mean().sqrt()),
        "deviation": float(variance.mean(0)[inside].mean().sqrt()),
    }


def drawn(truth: Tensor) -> Tensor:
    """(H, W) of bool: what is not the flat ground of an emoji, which every version has right and which flatters the ranks."""
    return (truth - truth[:, :1, :1]).abs().amax(0) > GROUND


def photo(operator, x: Tensor) -> Tensor:
    """The measurement of x (1, 3, H, W), of 8 bits as a photo has."""
    from dmap_core.evaluate.run import in_eight_bits

    return in_eight_bits(operator.measure(x))


def autoencoded(base, operator, x: Tensor) -> Tensor:
    """(3, H, W): x through the autoencoder, matched: the best that a version can be, which they all fall short of in the same way."""
    from dmap_core.consistency import match
    from dmap_core.operators.base import size_of

    prior = base.sized(size_of(x))
    with torch.no_grad():
        return match(operator, prior.decode(prior.encode(x)), photo(operator, x)).image[0]


def versions_of(base, operator, x: Tensor, seeds: list[int], solver: str) -> Tensor:
    """(k, 3, H, W) in [-1, 1]: what a solver of DMAPPreset makes of the measurement of x (1, 3, H, W) at *look*."""
    from dmap_core.consistency import match
    from dmap_core.operators.base import size_of
    from dmap_core.presets import automatic
    from dmap_core.restore import restore

    plan, prior, y = automatic(operator, solver, "look"), base.sized(size_of(x)), photo(operator, x)
    found = restore(prior, operator, y, prior.latent_shape(), plan.sigmas(base.sigmas), plan.solver, seeds)
    return match(operator, found.image, y).image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4, help="pictures (default: 4)")
    parser.add_argument("--versions", type=int, default=8, help="restorations of each (default: 8)")
    parser.add_argument("--operators", default="super-resolution-x8,gaussian-deblur")
    parser.add_argument("--solver", default=AUTO, help="of DMAPPreset (default: auto, what DMAP Restore takes)")
    parser.add_argument("--seed", type=int, default=0, help="of the first version; they are three apart (default: 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "uncertainty")
    args = parser.parse_args()
    from host import import_torchvision

    import_torchvision()
    from dmap_core.backends.diffusers_files import open_base
    from dmap_core.evaluate.pictures import Picture
    from dmap_core.evaluate.results import csv_text, write_text

    torch.set_num_threads(1)
    base = open_base(PRIOR_FILE)
    args.out.mkdir(parents=True, exist_ok=True)
    seeds, rows = [args.seed + 3 * i for i in range(args.versions)], []
    for name in names(args.operators, tuple(OPERATORS), "--operators"):
        where = HOLE > 0 if name == "inpainting" else None
        for file in sorted((HERE / "held-out").glob("*.png"))[-args.n :]:
            x = Picture(file, 0).open(None)
            kept = args.out / f"{args.solver}-{name}-{file.stem}-{args.seed}-{args.versions}.pt"
            if not kept.exists():
                write_whole(kept, partial(torch.save, versions_of(base, OPERATORS[name], x, seeds, args.solver)))
            versions, seen = torch.load(kept), drawn(x[0])
            row = {"solver": args.solver, "operator": name, "picture": file.stem, "k": args.versions, **figures(versions, x[0], where)}
            within = seen if where is None else seen & where
            row |= {f"{key}_drawn": value for key, value in figures(versions, x[0], within).items()}
            row["factor_autoencoded"] = figures(versions, autoencoded(base, OPERATORS[name], x), where)["factor"]
            rows.append(row)
            print(rows[-1], flush=True)
    write_text(args.out / f"{args.solver}.csv", csv_text(rows))


if __name__ == "__main__":
    main()
