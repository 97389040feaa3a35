"""Memory plans change what a run costs and nothing else, and auto takes the first that fits."""

import pytest
import torch


@pytest.fixture
def free_memory(lab, monkeypatch):
    """Sets how many bytes ComfyUI says are free."""

    def set_free(value):
        monkeypatch.setattr(lab.comfy.model_management, "get_free_memory", lambda *_, **__: value)

    return set_free


def saved_bytes(lab, monkeypatch, sampler):
    """Bytes that autograd keeps for one gradient with the plan fast."""
    budgets = []

    class Recorded(lab.core.memory.Budget):
        def __init__(self, *args):
            super().__init__(*args)
            budgets.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(lab.core.posterior, "Budget", Recorded)
        patch.setattr(lab.comfy.model_management, "get_free_memory", lambda *_, **__: float("inf"))
        lab.sample(lab.guider(memory="auto"), sampler, steps=1)
    (budget,) = budgets
    return budget.saved


@pytest.mark.parametrize("solver", ["dps", "dmap"])
def test_plans_agree(lab, solver):
    sampler = {"dps": lab.dps, "dmap": lab.dmap}[solver](zeta=5.0)
    latents = {}
    for plan in lab.core.memory.PLANS:
        guider = lab.guider(memory=plan)
        latents[plan] = lab.sample(guider, sampler, steps=2)
        assert guider.report.memory == plan
    for plan in ("lean", "checkpoint"):
        torch.testing.assert_close(latents[plan], latents["fast"], rtol=0, atol=1e-4 * float(latents["fast"].std()))


def test_auto_takes_the_first_plan_that_fits(lab, monkeypatch, free_memory):
    needed = saved_bytes(lab, monkeypatch, lab.dps()) / lab.core.memory.SHARE
    expected = lab.sample(lab.guider(memory="fast"), lab.dps(), steps=2)
    for free, plan in ((1.01 * needed, "fast"), (0.99 * needed, "lean"), (0.01 * needed, "checkpoint"), (0, "checkpoint")):
        free_memory(free)
        guider = lab.guider(memory="auto")
        latents = lab.sample(guider, lab.dps(), steps=2)
        assert (guider.report.memory, f"memory plan {plan}" in guider.report.text()) == (plan, True), f"with {free:.0f} bytes"
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_a_plan_that_was_asked_for_is_kept(lab, free_memory):
    free_memory(0)
    guider = lab.guider(memory="fast")
    lab.sample(guider, lab.dps(), steps=1)
    assert guider.report.memory == "fast"


def test_no_weight_gets_a_gradient(lab):
    model, vae = lab.shared()
    for plan in lab.core.memory.PLANS:
        lab.sample(lab.guider(memory=plan), lab.dps(), steps=1)
        assert all(p.grad is None for network in (model.model, vae.first_stage_model) for p in network.parameters())
