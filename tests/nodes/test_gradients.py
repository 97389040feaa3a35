"""The gradient inside ComfyUI is the slope of the residual, whatever the weights are.

For its last step to 0 a stock sampler is given denoised - zeta * gradient: that tells the gradient. The residual whose slope it must be
comes from ComfyUI's own guider and from the VAE's network under inference mode.
"""

import pytest
import torch

SIGMA = 2.0
STEP = 0.05


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(lab, z, **problem):
    denoised = lab.probe(lab.stock_guider(**problem), z, SIGMA)
    return denoised - lab.probe(lab.guider(zeta=1.0, **problem), z, SIGMA)


def check_slopes(lab, tolerance=0.02, **problem):
    """Central differences along the gradient and along two random directions."""
    h, w = lab.latent_size(problem)
    z = SIGMA * noise(1, 4, h, w, seed=1)
    grad = gradient(lab, z, **problem)
    norm = float(grad.norm())
    assert norm > 1e-3, "a gradient this small hides in the rounding errors"
    stock = lab.stock_guider(**problem)

    def residual(z):
        denoised = lab.probe(stock, z, SIGMA)
        return lab.residual(stock.model_patcher.model.process_latent_out(denoised), **problem)

    for direction in (grad, noise(*z.shape, seed=2), noise(*z.shape, seed=3)):
        direction = direction / direction.norm()
        slope = (residual(z + STEP * direction) - residual(z - STEP * direction)) / (2 * STEP)
        assert slope == pytest.approx(float((grad * direction).sum()), rel=0, abs=tolerance * norm)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_were_loaded_under_inference_mode(lab, dtype):
    model, vae = lab.fresh(getattr(torch, dtype))
    weights = list(model.model.diffusion_model.parameters())
    assert {p.dtype for p in weights} == {getattr(torch, dtype)}
    assert any(p.is_inference() for p in weights) and any(p.is_inference() for p in vae.first_stage_model.parameters())
    check_slopes(lab, model=model, vae=vae)


def test_a_lora(lab):
    check_slopes(lab, model=lab.with_lora(lab.shared()[0]))


def test_a_lora_moves_the_gradient(lab):
    z = SIGMA * noise(1, 4, *lab.latent_size(), seed=1)
    plain, patched = gradient(lab, z), gradient(lab, z, model=lab.with_lora(lab.shared()[0]))
    assert float((plain - patched).norm()) > 0.05 * float(plain.norm())


def test_a_separate_vae(lab):
    check_slopes(lab, vae=lab.separate_vae())


def test_a_vae_in_half_precision(lab):
    """Rounding to bfloat16 hides small differences from the residual, so that the full-precision gradient is the measure."""
    vae = lab.separate_vae(torch.bfloat16)
    assert vae.vae_dtype == torch.bfloat16
    z = SIGMA * noise(1, 4, *lab.latent_size(), seed=1)
    full, half = gradient(lab, z), gradient(lab, z, vae=vae)
    assert float((full - half).norm()) < 0.1 * float(full.norm())


def test_cfg(lab):
    negative = [[5 * noise(1, 3, 1024, seed=4), {}]]
    z = SIGMA * noise(1, 4, *lab.latent_size(), seed=1)
    plain, guided = (lab.probe(lab.stock_guider(negative=negative, cfg=cfg), z, SIGMA) for cfg in (1.0, 2.0))
    assert float((plain - guided).norm()) > 0.01 * float(plain.norm()), "this negative changes nothing"
    check_slopes(lab, negative=negative, cfg=2.0)


def test_conditioning_for_regions(lab):
    """Masks of the conditioning come from nodes, too, and stand in the graph."""
    left = torch.zeros(1, 4, 4)
    left[..., :2] = 1
    positive = []
    for seed, mask in ((5, left), (6, 1 - left)):
        condition = [[5 * noise(1, 3, 1024, seed=seed), {}]]
        positive += lab.call("ConditioningSetMask", conditioning=condition, mask=mask, set_cond_area="default", strength=0.7)
    check_slopes(lab, positive=positive)


def test_v_prediction(lab):
    """The demo prior predicts noise; read as a velocity, its output is still a function with a slope."""
    model = lab.call("ModelSamplingDiscrete", model=lab.shared()[0], sampling="v_prediction", zsnr=False)
    check_slopes(lab, model=model)


def test_a_picture_that_is_no_multiple_of_the_vaes_factor(lab):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=4)
    measurement = lab.call("DMAP_Degrade", image=lab.picture(height=28, width=36), operator=operator, noise_sigma=0.0, seed=0)
    check_slopes(lab, operator=operator, measurement=measurement)


@pytest.mark.parametrize("memory", ["lean", "checkpoint"])
def test_a_lean_plan(lab, memory):
    check_slopes(lab, memory=memory)


def test_a_batch(lab):
    """Every sample has the gradient it would have alone."""
    z = SIGMA * noise(2, 4, *lab.latent_size(), seed=5)
    both = gradient(lab, z)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], gradient(lab, z[i : i + 1]), rtol=0, atol=1e-3 * float(both.std()))
