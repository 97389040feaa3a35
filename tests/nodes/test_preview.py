"""What ComfyUI shows while a run goes on: pictures of the run's own decoder, which change nothing."""

import contextlib
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

STEPS = 3


@contextlib.contextmanager
def shown(lab, method="latent2rgb"):
    """A list that gets (value, total, picture or None) of everything that is sent to the interface in the context."""
    from comfy.cli_args import LatentPreviewMethod, args

    sent = []

    def hook(value, total, preview, node_id=None):
        sent.append((value, total, preview and preview[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(args, "preview_method", LatentPreviewMethod(method))
        patch.setattr(lab.comfy.utils, "PROGRESS_BAR_HOOK", hook)
        yield sent


def run(lab, guider, sampler, latent=None):
    """(both outputs of SamplerCustomAdvanced)."""
    return lab.call(
        "SamplerCustomAdvanced",
        noise=lab.call("RandomNoise", noise_seed=lab.SEED),
        guider=guider,
        sampler=sampler,
        sigmas=lab.sigmas(STEPS),
        latent_image=latent or lab.empty(),
    )


def pixels(picture):
    return torch.from_numpy(np.asarray(picture, np.float32)) / 255


def decoded(lab, latents):
    return lab.shared()[1].decode(latents)[0].clamp(0, 1)


@pytest.fixture(params=["dmap", "ddpm"])
def sampler(lab, request):
    return lab.dmap() if request.param == "dmap" else lab.stock("ddpm")


def test_the_preview_has_the_colours_of_the_decoded_picture(lab, sampler):
    with shown(lab) as sent:
        _, denoised = run(lab, lab.guider(), sampler)
    assert [(value, total) for value, total, picture in sent if picture.size == (lab.SIZE, lab.SIZE)] == [
        (1, STEPS),
        (2, STEPS),
        (3, STEPS),
        (3, STEPS),
    ]
    wanted = decoded(lab, denoised["samples"])
    assert (pixels(sent[-1][2]) - wanted).abs().max() < 1.01 / 255  # of 8 bits
    # what ComfyUI makes of it by itself, once, for the last latent: a pixel per latent, in other colours
    (hosts,) = [picture for _, _, picture in sent if picture.size != (lab.SIZE, lab.SIZE)]
    small = wanted.movedim(-1, 0)[None]
    small = torch.nn.functional.adaptive_avg_pool2d(small, hosts.size[::-1])[0].movedim(0, -1)
    assert (pixels(hosts) - small).abs().mean() > 0.1


def test_every_step_has_a_preview_of_its_own(lab):
    seen = []
    with shown(lab) as sent:
        lab.watch(lab.guider(), lab.dmap(), lambda step, denoised, z, steps: seen.append(denoised), STEPS)
    assert len(seen) == len(sent) == STEPS  # a callback that is not ComfyUI's is called at every step
    for z0, (_, _, picture) in zip(seen, sent, strict=True):
        assert (pixels(picture) - decoded(lab, lab.shared()[0].model.process_latent_out(z0))).abs().max() < 1.01 / 255


def test_it_changes_no_bit_and_is_no_call_of_the_run(lab, sampler):
    guiders = [lab.guider(), lab.guider()]
    with shown(lab, "none") as sent:
        plain = run(lab, guiders[0], sampler)
    assert {picture for _, _, picture in sent} == {None}  # how often: newer hosts leave out steps that follow quickly
    with shown(lab):
        seen = run(lab, guiders[1], sampler)
    for without, with_previews in zip(plain, seen, strict=True):
        assert torch.equal(without["samples"], with_previews["samples"])
    counts = [(g.report.denoiser_calls, g.report.decoder_calls, g.report.guidance_calls) for g in guiders]
    assert counts[0] == counts[1]


def test_only_the_first_of_a_batch_is_shown(lab):
    with shown(lab) as sent:
        _, denoised = run(lab, lab.guider(), lab.dmap(), lab.empty(batch=2))
    assert (pixels(sent[-1][2]) - decoded(lab, denoised["samples"][:1])).abs().max() < 1.01 / 255


def test_a_large_decoder_is_not_called(lab, monkeypatch):
    """ComfyUI's own preview fits the models that have one."""
    preview = importlib.import_module("dmap_pack.nodes.host.preview")
    monkeypatch.setattr(preview, "TAESD", type("Other", (), {}))
    with shown(lab) as sent:
        run(lab, lab.guider(), lab.dmap())
    assert [picture.size for _, _, picture in sent] == [(lab.SIZE // 8, lab.SIZE // 8)] * STEPS


def test_a_small_guidance_decoder_stands_in_for_a_large_one(lab, monkeypatch):
    large, small = lab.separate_vae(), lab.shared()[1]
    large.first_stage_model.__class__ = type("Large", (type(large.first_stage_model),), {})
    preview = importlib.import_module("dmap_pack.nodes.host.preview")
    monkeypatch.setattr(preview, "is_small", lambda vae: vae is small)
    guider = importlib.import_module("dmap_pack.nodes.host.guider")
    monkeypatch.setattr(guider, "is_small", preview.is_small)
    asked = []
    with lab.decoder(small, 0, None), shown(lab) as sent:
        decode = small.first_stage_model.decode
        small.first_stage_model.decode = lambda z: asked.append(torch.is_grad_enabled()) or decode(z)
        run(lab, lab.guider(vae=large, guidance_vae=small), lab.dmap())
    assert len([picture for _, _, picture in sent if picture.size == (lab.SIZE, lab.SIZE)]) == STEPS + 1
    assert asked.count(False) >= STEPS  # without a graph


def test_a_preview_that_does_not_fit_ends_no_run(lab, monkeypatch, caplog):
    def full(image):
        raise torch.OutOfMemoryError

    plain = lab.sample(lab.guider(), lab.dmap())
    monkeypatch.setattr(importlib.import_module("dmap_pack.nodes.host.preview"), "to_picture", full)
    with shown(lab) as sent:
        latents, _ = run(lab, lab.guider(), lab.dmap())
    assert torch.equal(latents["samples"], plain)
    assert caplog.text.count("no more previews") == 1
    assert sent[-1][:2] == (STEPS, STEPS)


def test_studies_show_nothing(lab):
    module = importlib.import_module("dmap_pack.nodes.host.run")
    solvers = importlib.import_module("dmap_pack.dmap_core.solvers")
    steps = []
    with shown(lab) as sent:
        module.restore(module.Problem(lab.guider()), solvers.DMAP(zeta=1.0, K=1), lab.sigmas(STEPS), 0, on_step=lambda: steps.append(1))
    assert len(steps) == STEPS and sent == []


def test_text_of_an_expanded_node_stands_on_the_node_that_people_see(lab, monkeypatch):
    clock = importlib.import_module("dmap_pack.nodes.host.clock")
    from comfy_execution.graph import DynamicPrompt
    from comfy_execution.progress import get_progress_state
    from comfy_execution.utils import CurrentNodeContext

    said = []
    prompt = DynamicPrompt({"5": {}})
    prompt.add_ephemeral_node("5.0.0.1", {}, "5", "5")
    monkeypatch.setattr(get_progress_state(), "dynprompt", prompt)
    instance = SimpleNamespace(send_progress_text=lambda text, node: said.append((text, node)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    for node in ("5", "5.0.0.1"):
        with CurrentNodeContext("a prompt", node):
            clock.say("step 1 of 3")
    assert said == [("step 1 of 3", "5")] * 2
