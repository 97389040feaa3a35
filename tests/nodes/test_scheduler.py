"""DMAPScheduler on the model's own noise levels."""

import pytest
import torch


@pytest.mark.parametrize("spacing", ["paper", "exponential"])
def test_levels_fall_from_the_models_largest_to_its_smallest_and_to_zero(lab, spacing):
    sampling = lab.shared()[0].model.model_sampling
    schedule = lab.sigmas(steps=7, spacing=spacing)
    assert len(schedule) == 8 and schedule.device.type == "cpu"
    assert (schedule[1:] < schedule[:-1]).all()
    assert float(schedule[0]) == pytest.approx(float(sampling.sigma_max), rel=1e-5)
    assert float(schedule[-2]) == pytest.approx(float(sampling.sigma_min), rel=1e-5)
    assert float(schedule[-1]) == 0


def test_the_papers_levels_are_the_models_where_all_are_taken(lab):
    sigmas = lab.shared()[0].model.model_sampling.sigmas
    torch.testing.assert_close(lab.sigmas(steps=len(sigmas))[:-1], sigmas.flip(0), rtol=1e-5, atol=0)


def test_exponential_levels_fall_by_the_same_factor(lab):
    schedule = lab.sigmas(steps=6, spacing="exponential")
    ratios = schedule[1:-1] / schedule[:-2]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=0)


@pytest.mark.parametrize("spacing", ["paper", "exponential"])
def test_start_and_end_are_fractions_of_the_timesteps(lab, spacing):
    sigmas = lab.shared()[0].model.model_sampling.sigmas
    last = len(sigmas) - 1
    schedule = lab.sigmas(steps=5, start=0.6, end=0.1, spacing=spacing)
    for level, fraction in ((schedule[0], 0.6), (schedule[-2], 0.1)):
        assert float(sigmas[int(fraction * last)]) <= float(level) <= float(sigmas[int(fraction * last) + 1])
    assert float(schedule[-1]) == 0


def test_the_default_is_the_papers(lab):
    assert torch.equal(lab.sigmas(steps=5), lab.sigmas(steps=5, spacing="paper"))


@pytest.mark.parametrize("spacing", ["paper", "exponential"])
def test_one_step(lab, spacing):
    sigma_max = float(lab.shared()[0].model.model_sampling.sigma_max)
    assert lab.sigmas(steps=1, spacing=spacing).tolist() == [pytest.approx(sigma_max, rel=1e-5), 0]


@pytest.mark.parametrize("spacing", ["paper", "exponential", "karras"])
@pytest.mark.parametrize("start", [1e-9, 1e-12, 1e-300])
def test_levels_that_would_be_equal(lab, spacing, start):
    """In float32, in which samplers get them: every sampler refuses two equal ones, so the node that makes them does."""
    with pytest.raises(ValueError, match=rf"start is {start:g} and end 0, which are too close for 20 steps: .*Raise start, or lower steps"):
        lab.sigmas(steps=20, start=start, spacing=spacing)
    assert len(lab.sigmas(steps=1, start=start, spacing=spacing)) == 2
    small = lab.sigmas(steps=20, start=0.001, spacing=spacing)
    assert (small[1:] < small[:-1]).all()
