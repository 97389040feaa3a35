"""Distances of sets of features, by closed forms and formulas written out with numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from host import import_torchvision
from scipy.linalg import sqrtm

from dmap_core.metrics.distribution import EfficientNetFeatures, frechet, frechet_warning, kernel


@pytest.fixture(autouse=True, scope="module")
def torchvision():
    import_torchvision()


def features(n, dimension, seed):
    """(n, dimension) float64, correlated, not centred."""
    generator = np.random.default_rng(seed)
    mix, mean = generator.normal(size=(dimension, dimension)), generator.normal(size=dimension)
    return torch.from_numpy(generator.normal(size=(n, dimension)) @ mix + mean)


def formula(real, fake):
    """Eq. 6 of Heusel et al. (2017), unbiased covariances."""
    real, fake = real.numpy(), fake.numpy()
    a, b = np.cov(real.T), np.cov(fake.T)
    return float(((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real))


@pytest.mark.parametrize("counts", [(40, 40), (60, 35)])
def test_frechet_is_the_formula(counts):
    real, fake = features(counts[0], 5, 0), features(counts[1], 5, 1)
    assert frechet(real, fake) == pytest.approx(formula(real, fake), rel=1e-9)
    assert frechet(fake, real) == pytest.approx(frechet(real, fake), rel=1e-9)
    assert frechet(real.float(), fake.float()) == pytest.approx(formula(real, fake), rel=1e-5)


def whitened(n, dimension, seed):
    """(n, dimension) with mean 0 and covariance I, exactly."""
    x = np.random.default_rng(seed).normal(size=(n, dimension))
    x -= x.mean(axis=0)
    return torch.from_numpy(x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T)


def test_frechet_of_gaussians_whose_covariances_commute_is_the_closed_form():
    shift, a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 4.0])
    real, fake = whitened(30, 3, 0) * a, whitened(50, 3, 1) * b + shift
    assert frechet(real, fake) == pytest.approx(float(shift.square().sum() + (a - b).square().sum()), rel=1e-9)


def test_frechet_of_equal_sets_is_zero():
    real = features(50, 4, 2)
    assert abs(frechet(real, real)) < 1e-8


def discrepancy(x, y):
    """The unbiased estimate of MMD^2, Eq. 4 of Binkowski et al. (2018), with the kernel (x.y / D + 1)^3, term by term."""

    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_kernel_of_one_subset_of_all_is_the_unbiased_estimate():
    real, fake = features(20, 4, 0), features(20, 4, 1)
    mean, deviation = kernel(real, fake, subsets=1)
    assert mean == pytest.approx(discrepancy(real.numpy(), fake.numpy()), rel=1e-9)
    assert math.isnan(deviation)
    again = kernel(real, fake)  # 100 subsets would all be the same
    assert again[0] == pytest.approx(mean, rel=1e-12) and math.isnan(again[1])


def test_kernel_averages_over_subsets_of_both_sets():
    """Every pair of a two-element subset of 3 with one of 4 comes up; their mean is the estimate of the whole, as it is unbiased."""
    real, fake = features(3, 2, 0), features(4, 2, 1)
    mean, deviation = kernel(real, fake, subsets=1500, subset_size=2)
    of_pairs = [
        discrepancy(real.numpy()[[i, j]], fake.numpy()[[k, m]]) for i in range(3) for j in range(i) for k in range(4) for m in range(k)
    ]
    assert deviation == pytest.approx(np.std(of_pairs), rel=0.1)
    assert mean == pytest.approx(discrepancy(real.numpy(), fake.numpy()), abs=4 * deviation / math.sqrt(1500))


def test_kernels_subsets_have_the_size_of_the_smaller_set_unless_told():
    real, fake = features(12, 3, 0), features(8, 3, 1)
    assert kernel(real, fake, subsets=5) == kernel(real, fake, subsets=5, subset_size=8)
    assert kernel(real, fake, subsets=5) != kernel(real, fake, subsets=5, subset_size=7)


def test_kernel_is_reproducible_and_leaves_torchs_random_numbers_alone():
    real, fake = features(30, 3, 0), features(30, 3, 1)
    before = torch.get_rng_state()
    first = kernel(real, fake, subsets=3, subset_size=10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert kernel(real, fake, subsets=3, subset_size=10) == first
    assert kernel(real, fake, subsets=3, subset_size=10, seed=1) != first


def test_a_host_may_call_under_inference_mode():
    with torch.inference_mode():
        real, fake = features(30, 3, 0) + 0, features(30, 3, 1) + 0
        inside = frechet(real, fake), kernel(real, fake, subsets=3, subset_size=9)
    assert inside == (frechet(features(30, 3, 0), features(30, 3, 1)), kernel(features(30, 3, 0), features(30, 3, 1), 3, 9))


@pytest.mark.parametrize("distance", [frechet, kernel])
def test_what_is_refused(distance):
    real, fake = features(6, 3, 0), features(6, 3, 1)
    for given, message in (
        ((real, fake[:1]), r"the fake set has 1 picture\(s\).*2 at least"),
        ((real[:0], fake), r"the real set has 0 picture\(s\)"),
        ((real, fake[:, :2]), "real and fake have 3 and 2 features"),
        ((real[0], fake), r"real features have shape \(3,\)"),
        ((real * torch.inf, fake), "the real features hold NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            distance(*given)


def test_kernels_settings_that_are_refused():
    real, fake = features(6, 3, 0), features(5, 3, 1)
    for settings in ({"subset_size": 6}, {"subset_size": 1}, {"subsets": 0}):
        with pytest.raises(ValueError, match="2 to 5, the size of the smaller set"):
            kernel(real, fake, **settings)


def test_frechets_bias_is_warned_of_and_real():
    singular, few = frechet_warning(2048, 2048), frechet_warning(2049, 2048)
    assert "2048 pictures" in singular and "singular" in singular and "biased upwards" not in singular
    assert "2049 pictures" in few and "biased upwards" in few and "singular" not in few
    assert "biased upwards" in frechet_warning(9999, 5)
    assert frechet_warning(10_000, 2048) is None
    same = [frechet(features(n, 5, 0), features(2 * n, 5, 0)[n:]) for n in (10, 1000)]  # the same mix and mean, other samples
    assert same[0] > 10 * same[1] > 0


def test_efficientnets_features_are_what_its_classifier_sees():
    network = EfficientNetFeatures()
    image = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    found = network(image)
    assert found.shape == (2, 1280) and not found.requires_grad
    with torch.no_grad():
        assert torch.allclose(network.network._fc(found), network.network(2 * image - 1), atol=1e-4)
    assert torch.equal(network(image * 1.2 - 0.1), network((image * 1.2 - 0.1).clamp(0, 1)))
    with pytest.raises(ValueError, match=r"image has shape \(3, 40, 56\)"):
        network(image[0])
