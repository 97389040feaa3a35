"""demo/seams.py: where tiles end, and that a seam there is seen."""

import pytest
import torch
from host import ROOT


@pytest.fixture
def seams(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import seams

    return seams


def test_edges_are_those_of_tiles_and_the_others_are_not(seams):
    ours, others = seams.edges(64)
    assert {96, 128, 192, 224} <= set(ours) and not set(ours) & set(others)
    assert all(k % seams.FACTOR == 0 and 0 < k < 512 for k in (*ours, *others))
    assert all(abs(k - other) > seams.FACTOR for k in ours for other in others)


def test_a_seam_is_seen_where_it_is(seams):
    noise = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    ours, others = seams.seam(noise)
    assert ours == pytest.approx(1, abs=0.02) and others == pytest.approx(1, abs=0.02)
    torn = noise.clone()
    edge = seams.edges(64)[0][2]
    torn[..., edge:] += 8
    ours, others = seams.seam(torn)
    assert ours > 1.1 and others == pytest.approx(1, abs=0.02)


def test_the_collage_is_made_of_held_out_pictures(seams):
    x = seams.collage(256, 160)
    assert x.shape == (1, 3, 160, 256) and x.min() >= -1 and x.max() <= 1 and x.std() > 0.1
