"""Rows and series of several runs side by side."""

import math

import pytest

from dmap_core.studies.comparison import Outcome, comparison_rows, comparison_series
from dmap_core.studies.diversity import deviation_maps, diversity, diversity_rows

RUNS = [
    Outcome("DPS, T = 4", {"method": "DPS", "T": 4}, {"PSNR": [20.0, 22.0], "residual": [1.0, 3.0]}, 8.0, 4),
    Outcome("DMAP, K = 2", {"method": "DMAP", "T": 2}, {"PSNR": [25.0, 25.0], "residual": [0.5, 0.5]}, 9.0, 5),
]


def test_a_row_for_every_picture_of_every_run():
    rows = comparison_rows(RUNS)
    assert [(row["method"], row["picture"], row["PSNR"], row["residual"]) for row in rows] == [
        ("DPS", 1, 20.0, 1.0),
        ("DPS", 2, 22.0, 3.0),
        ("DMAP", 1, 25.0, 0.5),
        ("DMAP", 2, 25.0, 0.5),
    ]
    assert list(rows[0]) == ["method", "T", "picture", "PSNR", "residual", "seconds of the batch", "denoiser calls"]
    assert [(row["seconds of the batch"], row["denoiser calls"]) for row in rows] == [(8.0, 4)] * 2 + [(9.0, 5)] * 2


def test_series_have_intervals_and_seconds_none():
    series = comparison_series(RUNS)
    assert set(series) == {"PSNR", "residual", "seconds"}
    label, mean, low, high = series["PSNR"][0]
    assert (label, mean) == ("DPS, T = 4", 21.0)
    assert high - mean == pytest.approx(12.7062) == mean - low  # Student's t with one degree of freedom; the standard error is 1
    assert series["PSNR"][1][2:] == (25.0, 25.0)
    assert [(label, mean) for label, mean, _, _ in series["seconds"]] == [("DPS, T = 4", 8.0), ("DMAP, K = 2", 9.0)]
    assert all(math.isnan(low) and math.isnan(high) for _, _, low, high in series["seconds"])


def test_rows_and_maps_of_spreads():
    import torch

    images = torch.rand(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    wide, narrow = diversity(images), diversity(0.5 + 0.25 * (images - 0.5))
    rows = diversity_rows([("a", wide), ("b", narrow)])
    assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["k"] == 4
    assert rows[1]["mean standard deviation"] == pytest.approx(0.25 * rows[0]["mean standard deviation"])
    maps = deviation_maps([wide, narrow])
    assert maps.shape == (2, 8, 6) and float(maps.max()) == 1
    torch.testing.assert_close(maps[1], 0.25 * maps[0])
    same = diversity(images[:1].expand(3, -1, -1, -1))
    assert deviation_maps([same]).abs().max() == 0  # no division by 0
