"""Tiles: windows that sum to one, networks whose reach the margin covers, and the gradient of the whole."""

import pytest
import torch
from torch import nn

from dmap_core.tiles import Tiles, tiled

SIZES = [(8, 8), (9, 31), (20, 24), (25, 17), (40, 33)]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 12, 13, 16, 17, 24, 31, 40, 69])
@pytest.mark.parametrize("tiles", [Tiles(8, 4), Tiles(8, 1), Tiles(12, 5, 1), Tiles(16, 8, 3)], ids=str)
def test_windows_sum_to_one(tiles, n):
    for factor in (1, 4):
        total = torch.zeros(n * factor, dtype=torch.float64)
        spans, windows = tiles.spans(n), tiles.windows(n, factor)
        for span, window in zip(spans, windows, strict=True):
            assert (window >= 0).all() and len(window) == factor * (span.stop - span.start)
            total[span.start * factor : span.stop * factor] += window
        torch.testing.assert_close(total, torch.ones(n * factor, dtype=torch.float64))
    assert spans[0].start == 0 and spans[-1].stop == n and all(s.stop - s.start == min(n, tiles.size) for s in spans)
    assert all(a.stop - b.start >= tiles.overlap for a, b in zip(spans, spans[1:], strict=False))


def test_the_margin_has_no_weight():
    first, last = Tiles(16, 8, 3).windows(24)
    assert not last[:3].any() and last[3] > 0 and first[0] == 1 and not first[-3:].any()


def convolutions(reach, factor=1, of=1, dtype=torch.float64):
    """A network whose results depend on `reach` latents around them. factor: pixels of its result per latent; of: those of what it is given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 2, of, stride=of)]
        layers += [layer for _ in range(reach) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())]
        layers += [nn.Upsample(scale_factor=factor), nn.Conv2d(2, 3, 1)]
        return nn.Sequential(*layers).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor, of", [(1, 1), (4, 1), (1, 4)], ids=["denoiser", "decoder", "encoder"])
def test_tiles_equal_the_whole(size, factor, of):
    """A margin of the network's reach: nothing that is used has seen a tile's edge. Values and gradient."""
    network, tiles = convolutions(2, factor, of), Tiles(12, 6, 2)
    x = torch.randn(2, 2, *(of * n for n in size), generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    whole, parts = network(x), tiled(lambda x, _: network(x), x, tiles, factor, of)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    cotangent = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected, found = (torch.autograd.grad(output, x, cotangent)[0] for output in (whole, parts))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_without_margin_the_edges_are_seen():
    network = convolutions(2)
    x = torch.randn(1, 2, 30, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (tiled(lambda x, _: network(x), x, Tiles(12, 4)) - network(x)).abs().max() > 1e-3


@pytest.mark.parametrize("tiles", [Tiles(6, 2), Tiles(6, 3, 1)], ids=str)
def test_the_gradient_is_that_of_what_is_computed(tiles):
    """Whatever the network, also one that knows where its tile lies."""
    network = convolutions(1)
    where = torch.linspace(0, 1, 10 * 13, dtype=torch.float64).view(10, 13)

    def f(x):
        return tiled(lambda x, part: network(x) * where[part[0], part[1]], x, tiles)

    x = torch.randn(2, 2, 10, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(f, (x,))


@pytest.mark.parametrize("of", [1, 8])
def test_memory_is_that_of_a_tile(of):
    """No network sees more than a tile, and nothing of it is kept between forward and backward."""
    seen, saved = [], []
    network = convolutions(2, of=of)

    def counting(x, part):
        seen.append(tuple(x.shape[-2:]))
        return network(x)

    x = torch.randn(1, 2, of * 40, of * 40, dtype=torch.float64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        output = tiled(counting, x, Tiles(12, 4), of=of)
    assert set(seen) == {(of * 12, of * 12)} and sum(saved) <= x.numel()
    calls = len(seen)
    output.sum().backward()
    assert len(seen) == 2 * calls == 2 * 25


@pytest.mark.parametrize("given", [(1, 1), (8, 5), (8, 0), (8, 4, 2), (8.5, 2), (8, 2, -1)])
def test_tiles_without_meaning(given):
    with pytest.raises(ValueError, match="Tiles: "):
        Tiles(*given)
