"""Memory plans change what a run costs and nothing else, and auto takes the first that fits."""

import pytest
import torch


@pytest.fixture
def free_memory(lab, monkeypatch):
    """Sets how many bytes ComfyUI says are free."""

    def set_free(value):
        monkeypatch.setattr(lab.comfy.model_management, "get_free_memory", lambda *_, **__: value)

    return set_free


def saved_bytes(lab):
    """Bytes that autograd keeps for one gradient with the plan fast, weights aside."""
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lab.sample(lab.guider(memory="fast"), lab.dps(), steps=1)
    model, vae = lab.shared()
    weights = {p.untyped_storage().data_ptr() for network in (model.model, vae.first_stage_model) for p in network.parameters()}
    return sum(size for address, size in sizes.items() if address not in weights)


@pytest.mark.parametrize("solver", ["dps", "dmap"])
def test_plans_agree(lab, solver):
    sampler = {"dps": lab.dps, "dmap": lab.dmap}[solver](zeta=5.0)
    latents = {}
    for plan in lab.core.gradient.STRATEGIES:
        guider = lab.guider(memory=plan)
        latents[plan] = lab.sample(guider, sampler, steps=2)
        assert guider.report.memory == plan
    for plan in ("lean", "checkpoint"):
        torch.testing.assert_close(latents[plan], latents["fast"], rtol=0, atol=1e-4 * float(latents["fast"].std()))


def test_auto_takes_the_first_plan_that_fits(lab, free_memory):
    expected = lab.sample(lab.guider(memory="fast"), lab.dps(), steps=2)
    needed = saved_bytes(lab) / lab.core.memory.SHARE
    for free, plan in ((1.05 * needed, "fast"), (0.95 * needed, "lean"), (0.01 * needed, "checkpoint"), (0, "checkpoint")):
        free_memory(free)
        guider = lab.guider(memory="auto")
        latents = lab.sample(guider, lab.dps(), steps=2)
        assert guider.report.memory == plan, f"with {free:.0f} bytes"
        assert f"memory plan {plan}" in guider.report.text()
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_a_plan_that_was_asked_for_is_kept(lab, free_memory):
    free_memory(0)
    guider = lab.guider(memory="fast")
    lab.sample(guider, lab.dps(), steps=1)
    assert guider.report.memory == "fast"


def test_no_weight_gets_a_gradient(lab):
    model, vae = lab.shared()
    for plan in lab.core.gradient.STRATEGIES:
        lab.sample(lab.guider(memory=plan), lab.dps(), steps=1)
        assert all(p.grad is None for network in (model.model, vae.first_stage_model) for p in network.parameters())
