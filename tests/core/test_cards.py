"""README's table of graphics cards is what benchmarks/cards.py counts, and its sentences are true of it."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cards():
    spec = importlib.util.spec_from_file_location("cards", ROOT / "benchmarks" / "cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_in_the_readme(cards):
    assert "\n".join(cards.table()) in README


def test_a_cell_by_hand(cards):
    """SD 2.0 at 512x512, look: 10 calls of the denoiser, 14 gradients of the decoder and a call of it, by the table of operations in docs/performance.md."""
    tflop = 10 * (0.681 + 0.122) + 14 * (2.480 + 0.034 + 2.480 + 0.086) + (2.480 + 0.034)
    assert cards.minutes(("SD 2.0", (512, 512), None), 30.2, "fast")[0] == pytest.approx(tflop / (0.25 * 30.2) / 60, rel=1e-3)


def test_holes_and_the_leanest_sdxl(cards):
    low, high = cards.holes()
    assert re.search(rf"Holes and scratches take {low:.1f} \(SD\) to {high:.1f} \(SDXL\) times as long", README)
    assert cards.plan("SDXL", (512, 512), None, 8) == ("checkpoint", pytest.approx(6.0, abs=0.05))  # what `tile` 512 takes


def test_what_a_megapixel_of_sdxl_costs_in_tiles(cards):
    def per_pixel(size, tile):
        return cards.tflop(cards.SuperResolution(4), "look", "SDXL", size, tile, "fast") / (size[0] * size[1])

    dearer = [per_pixel(size, 128) / per_pixel((1024, 1024), None) for size in ((1024, 1664), (1288, 1288), (1536, 1536), (2048, 2048))]
    assert min(dearer) > 1.5 and max(dearer) < 4.5, dearer
