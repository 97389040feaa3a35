"""DPSGuider's guidance_vae: gradients through another decoder of the same latents, the result by the full one."""

import copy

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def altered(lab, change):
    """The demo prior's VAE, loaded again, with `change(name, tensor)` done to its decoder."""
    import comfy.sd

    weights = {name: tensor.clone() for name, tensor in lab.shared()[1].first_stage_model.state_dict().items()}
    for name, tensor in weights.items():
        if name.startswith("taesd_decoder."):
            weights[name] = change(name, tensor)
    return comfy.sd.VAE(sd=weights)


def run(lab, sampler=None, tried=True, **changes):
    guider = lab.guider(**changes)
    guider.vae_tried = tried
    sampler = sampler or lab.call("DMAP_DMAPSampler", K=1, step="auto", strength=0.7, jacobian="none", zeta=1.0, inner=2)
    return lab.sample(guider, sampler, schedule=lab.sigmas(4, spacing="exponential")), guider.report


@pytest.mark.parametrize("tile", ["whole", "128"])
def test_the_same_decoder_changes_no_bit(lab, tile):
    plain, report = run(lab, tile=tile)
    guided, told = run(lab, tile=tile, guidance_vae=altered(lab, lambda name, t: t))
    assert torch.equal(plain, guided) and report.guidance_calls == 0
    assert (told.guidance_calls, told.decoder_calls, told.denoiser_calls) == (6, 1, report.denoiser_calls)
    assert "6 guidance decoder calls" in told.text() and "guidance" not in report.text()


def test_a_stock_sampler(lab):
    plain, _ = run(lab, lab.stock("ddpm"), step="auto", strength=0.5)
    guided, told = run(lab, lab.stock("ddpm"), step="auto", strength=0.5, guidance_vae=altered(lab, lambda name, t: t))
    assert torch.equal(plain, guided) and told.guidance_calls == 4


def test_another_decoder_guides_and_the_result_is_the_full_ones(lab):
    """A little noise on its weights: another latent, which explains the measurement through the full decoder nearly as well."""
    rng = torch.Generator().manual_seed(0)

    def noisy(name, tensor):
        return tensor * (1 + 0.02 * torch.randn(tensor.shape, generator=rng)) if tensor.is_floating_point() else tensor

    plain, report = run(lab)
    guided, told = run(lab, tried=False, guidance_vae=altered(lab, noisy))
    assert not torch.equal(plain, guided) and not any("guidance_vae" in warning for warning in told.warnings)
    assert told.residuals[-1][0] < 1.5 * report.residuals[-1][0]


def test_one_that_decodes_something_else_is_told(lab):
    _, told = run(lab, tried=False, guidance_vae=altered(lab, lambda name, t: t.flip(0) if t.ndim == 4 and t.shape[:2] == (64, 64) else t))
    assert any("guidance_vae and vae decode the measurement to pictures" in warning for warning in told.warnings), told.warnings


def test_what_is_refused(lab):
    vae = altered(lab, lambda name, t: t)
    wider = copy.copy(vae)
    wider.latent_channels = 16
    with pytest.raises(ValueError, match="guidance_vae: it has 16 latent channels and the model 4"):
        lab.guider(guidance_vae=wider)
    wider = copy.copy(vae)
    wider.downscale_ratio = 16
    with pytest.raises(
        ValueError, match="guidance_vae: a latent is 16 pixels wide in it and 8 in vae; load a small decoder of the same latents"
    ):
        lab.guider(guidance_vae=wider)
