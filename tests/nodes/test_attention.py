"""Attention that drops gradients, as some fast kernels do, is not used for guidance."""

import torch


def test_an_override_of_the_users_is_replaced_for_the_run_only(lab):
    used = []

    def gradient_free_garbage(attention, *args, **kwargs):
        used.append(1)
        return torch.zeros_like(attention(*args, **kwargs)).detach()

    model = lab.shared()[0].clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = gradient_free_garbage
    for sampler in (lab.dps(), lab.dmap(), lab.stock("ddpm")):
        latents = lab.sample(lab.guider(model=model), sampler, steps=2)
        assert torch.equal(latents, lab.sample(lab.guider(), sampler, steps=2))
    assert not used
    assert model.model_options["transformer_options"]["optimized_attention_override"] is gradient_free_garbage
    assert not torch.equal(lab.ksampler(model), lab.ksampler(lab.shared()[0]))
    assert used


def test_the_pack_leaves_no_override_behind(lab):
    model = lab.shared()[0]
    lab.sample(lab.guider(), lab.dps(), steps=1)
    assert "optimized_attention_override" not in model.model_options["transformer_options"]


def test_attention_of_a_controlnet_is_not_the_hosts(lab, monkeypatch):
    import cses
    from comfy.ldm.modules import attention

    used = []

    @attention.wrap_attn
    def gradient_free_garbage(q, k, v, heads, **kwargs):
        used.append(1)
        return torch.zeros_like(attention.attention_pytorch(q, k, v, heads, **kwargs)).detach()

    model = lab.shared()[0]
    inputs = lab.problem()
    control = comfy_controlnet(cses.weights(model))
    seeing = cses.apply(control, inputs["measurement"], inputs["operator"])
    with monkeypatch.context() as patch:
        patch.setattr(attention, "optimized_attention", gradient_free_garbage)
        patch.setattr(attention, "optimized_attention_masked", gradient_free_garbage)
        latents = lab.sample(lab.guider(positive=seeing), lab.dps(), steps=2)
        assert not used
        control.control_model(torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, 1, 1024))
        assert used  # outside of a run it is the host's again
    assert torch.equal(latents, lab.sample(lab.guider(positive=seeing), lab.dps(), steps=2))


def comfy_controlnet(weights):
    import comfy.controlnet

    return comfy.controlnet.load_controlnet_state_dict(dict(weights))
