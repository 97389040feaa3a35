"""The spread of restorations against numpy, scipy and distributions of known spread."""

import math

import numpy as np
import pytest
import torch

from dmap_core.studies.diversity import diversity


def uniform(k, size=8, seed=0):
    return torch.rand(k, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_mean_and_deviations_are_numpys():
    images = uniform(6)
    found = diversity(images)
    values = images.double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), values.mean(0), rtol=1e-6)
    deviations = values.std(0, ddof=1).mean(0)
    np.testing.assert_allclose(found.std.numpy(), deviations, rtol=1e-6)
    assert found.mean_std == pytest.approx(deviations.mean())
    assert (found.mean.shape, found.std.shape, found.k) == ((3, 8, 8), (8, 8), 6)


def test_a_uniform_distribution_has_its_known_deviation():
    """1 / sqrt(12), and the error says how well 200 samples of 192 values know it."""
    found = diversity(uniform(200))
    assert found.mean_std == pytest.approx(1 / math.sqrt(12), abs=4 * found.error)
    # the deviation of one uniform number has a relative error of sqrt((9/5 - 1) / 4 k) for kurtosis 9/5
    assert found.error == pytest.approx(1 / math.sqrt(12) * math.sqrt(0.8 / 4 / 200 / 192), rel=0.3)


def test_the_error_is_the_jackknifes():
    images = uniform(7, seed=3)
    values = images.double().numpy()
    without = [np.delete(values, i, axis=0).std(0, ddof=1).mean() for i in range(7)]
    expected = math.sqrt(6 / 7 * np.square(np.array(without) - np.mean(without)).sum())
    assert diversity(images).error == pytest.approx(expected, rel=1e-9)


def test_the_error_is_what_repeating_shows():
    spreads = [diversity(uniform(10, 2, seed)) for seed in range(150)]
    observed = np.std([d.mean_std for d in spreads])
    assert np.sqrt(np.mean([d.error**2 for d in spreads])) == pytest.approx(observed, rel=0.25)


def test_equal_restorations_have_no_spread():
    found = diversity(uniform(1).expand(4, -1, -1, -1))
    assert found.mean_std < 1e-12
    assert found.error < 1e-12


def test_two_restorations_have_a_spread_but_no_error():
    images = uniform(2)
    found = diversity(images)
    assert found.mean_std == pytest.approx(float((images[0] - images[1]).abs().mean()) / math.sqrt(2), rel=1e-6)
    assert math.isnan(found.error)


@pytest.mark.parametrize(
    "images, match",
    [
        (torch.zeros(1, 3, 4, 4), "at least 2"),
        (torch.zeros(3, 4, 4), "must be"),
        (torch.zeros(3, 1, 4, 4), "must be"),
        (torch.zeros(3, 3, 4, 4) - 0.5, "outside"),
        (torch.full((3, 3, 4, 4), math.nan), "NaN"),
    ],
)
def test_what_is_no_set_of_pictures_is_refused(images, match):
    with pytest.raises(ValueError, match=match):
        diversity(images)
