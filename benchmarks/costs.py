"""Counts the constants of dmap_core/costs.py and prints them as they stand there.

python -m benchmarks costs
"""

from __future__ import annotations

from dmap_core.costs import ENCODER

from .flops import SIZES, TERA, decoder_flop, denoiser_flop, encoder_flop, fitted
from .live import fake, weight_bytes
from .memory import Bytes, decoder_bytes, denoiser_bytes, encoder_bytes
from .shapes import DECODERS, FAMILIES, build

LINE = (512, 1024)  # sizes between which bytes are a line; a third one shows that they are
WIDTHS = {4: "fp32", 2: "fp16"}


def line(small: int, large: int) -> tuple[int, int]:
    """(constant, per area) of bytes at the two sizes of LINE."""
    areas = [(size / 512) ** 2 for size in LINE]
    slope = (large - small) / (areas[1] - areas[0])
    return round(small - slope * areas[0]), round(slope)


def lines(found: list[Bytes]) -> dict[str, tuple[int, int]]:
    return {name: line(*(getattr(b, name) for b in found)) for name in ("forward", "saved", "peak")}


def main() -> None:
    with fake():
        networks = {name: build(name, "TAESD", weights=False).unet for name in FAMILIES}
        networks |= {name: build("demo prior", name, weights=False).autoencoder for name in DECODERS}
        print("PARAMETERS =", {name: weight_bytes([network]) // 4 for name, network in networks.items()}, flush=True)
    print("FLOP = {")
    counts = [(name, name, denoiser_flop) for name in FAMILIES] + [(name, name, decoder_flop) for name in DECODERS]
    for name, network, count in (*counts, *((name + ENCODER, name, encoder_flop) for name in DECODERS)):
        pairs = [count(network, size) for size in SIZES]
        found = [fitted(SIZES, values) for values in zip(*pairs, strict=True)]
        rounded = [tuple(float(f"{n / TERA:.5g}") for n in (lin, quad)) for lin, quad, _ in found]
        print(f'    "{name}": ({rounded[0]}, {rounded[1]}),  # worst error {max(error for _, _, error in found):.1%}', flush=True)
    print("}\nBYTES = {")
    for name in (*FAMILIES, *DECODERS, *(decoder + ENCODER for decoder in DECODERS)):
        for width, dtype in WIDTHS.items():
            for recompute in (False, True):
                with fake():
                    if name in FAMILIES:
                        prior = build(name, "TAESD", dtype, weights=False)
                        found = [denoiser_bytes(prior, size, recompute) for size in LINE]
                    else:
                        prior = build("demo prior", name.removesuffix(ENCODER), dtype, weights=False)
                        count = encoder_bytes if name.endswith(ENCODER) else decoder_bytes
                        found = [count(prior, size, recompute) for size in LINE]
                print(f'    ("{name}", {width}, {recompute}): {lines(found)},', flush=True)
    print("}")
