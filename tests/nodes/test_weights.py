"""A run leaves the model and the VAE exactly as they were."""

import contextlib

import pytest
import torch


def state(model, vae):
    """All that a run could leave behind: weights and buffers, their flags and gradients, methods that were replaced."""
    networks = {"model": model.model, "vae": vae.first_stage_model}
    return {
        "values": {f"{n}.{k}": v.clone() for n, network in networks.items() for k, v in network.state_dict().items()},
        "flags": {f"{n}.{k}": p.requires_grad for n, network in networks.items() for k, p in network.named_parameters()},
        "gradients": [k for network in networks.values() for k, p in network.named_parameters() if p.grad is not None],
        "replaced": [k for network in networks.values() for k, m in network.named_modules() if vars(m).keys() & {"forward", "decode"}],
    }


@contextlib.contextmanager
def left_alone(lab, model, vae):
    """What happens in the context changes neither the state nor what the stock KSampler makes of the model."""
    picture = lab.ksampler(model)
    before = state(model, vae)
    yield
    after = state(model, vae)
    assert before["values"].keys() == after["values"].keys()
    assert [k for k, v in before["values"].items() if not torch.equal(v, after["values"][k])] == []
    assert [k for k, flag in before["flags"].items() if flag != after["flags"][k]] == []
    assert after["gradients"] == [] and after["replaced"] == []
    assert torch.equal(lab.ksampler(model), picture)


def test_weights_from_a_loader(lab):
    """They are inference tensors, which the run has to replace by others."""
    model, vae = lab.fresh()
    with left_alone(lab, model, vae):
        lab.sample(lab.guider(model=model, vae=vae), lab.dps(), steps=2)


@pytest.mark.parametrize("memory", ["fast", "lean", "checkpoint"])
@pytest.mark.parametrize("solver", ["dps", "dmap", "ddpm"])
def test_every_solver_and_plan(lab, solver, memory):
    sampler = {"dps": lab.dps, "dmap": lab.dmap, "ddpm": lambda: lab.stock("ddpm")}[solver]()
    model, vae = lab.shared()
    with left_alone(lab, model, vae):
        lab.sample(lab.guider(memory=memory), sampler, steps=2)


@pytest.mark.parametrize("flag", [True, False])
def test_flags(lab, flag):
    """Weights that were being trained stay trainable, and frozen ones stay frozen; neither gets a gradient."""
    model, vae = lab.shared()
    with torch.inference_mode(False):
        networks = (model.model, vae.first_stage_model)
        lab.sample(lab.guider(), lab.dps(), steps=1)  # no inference tensors are left: their flags cannot be set
        before = [(p, p.requires_grad) for network in networks for p in network.parameters()]
        try:
            for p, _ in before:
                p.requires_grad_(flag)
            with left_alone(lab, model, vae):
                lab.sample(lab.guider(), lab.dps(), steps=2)
        finally:
            for p, old in before:
                p.requires_grad_(old)


def test_a_lora_is_taken_off(lab):
    model, vae = lab.shared()
    patched = lab.with_lora(model)
    lab.ksampler(patched)  # ComfyUI itself clears the flags of weights that it patches: the pack is not to blame for that
    with left_alone(lab, model, vae):
        plain = lab.sample(lab.guider(), lab.dps(), steps=2)
        assert not torch.allclose(lab.sample(lab.guider(model=patched), lab.dps(), steps=2), plain, atol=1e-2)
        assert torch.equal(lab.sample(lab.guider(), lab.dps(), steps=2), plain)


@pytest.mark.parametrize("memory", ["fast", "checkpoint"])
def test_a_run_that_diverges(lab, memory):
    model, vae = lab.shared()
    with left_alone(lab, model, vae), lab.diverging(vae, at=2), pytest.raises(lab.core.errors.Diverged):
        lab.sample(lab.guider(memory=memory), lab.dmap(), steps=3)


@pytest.mark.parametrize("memory", ["fast", "checkpoint"])
def test_a_run_that_is_interrupted(lab, memory):
    model, vae = lab.shared()
    interrupted = lab.comfy.model_management.InterruptProcessingException
    with left_alone(lab, model, vae), lab.interrupting(vae, at=2), pytest.raises(interrupted):
        lab.sample(lab.guider(memory=memory), lab.dmap(), steps=3)
