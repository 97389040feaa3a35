"""What a run takes is said before it begins, and one that cannot fit is refused."""

import importlib
import logging
from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
GIB = 2**30


@pytest.fixture(scope="module")
def jobs(lab):
    return importlib.import_module("dmap_pack.nodes.host.job")


@pytest.fixture(scope="module")
def costs(lab):
    return importlib.import_module("dmap_pack.dmap_core.costs")


def sd2(jobs, calls=None, **changes):
    """calls: of a run, in the place of a guided step's; denoiser, denoiser_gradients, decoder, decoder_gradients, encoder, encoder_gradients."""
    job = jobs.Job("SD 2.0", "KL", "KL", (512, 512), 1, None, "fp16", "bf16", jobs.Cost(*(calls or (1, 1, 1, 1))))
    return replace(job, **changes)


def test_the_demo_prior_is_known(lab, jobs):
    model, vae = lab.shared()
    assert (jobs.family_of(model), jobs.decoder_of(vae)) == ("demo prior", "TAESD")


def test_operations_are_those_of_its_calls(lab, jobs, costs):
    dmap, dps = (lab.call(f"DMAP_{name}Sampler", zeta=1.0, **more) for name, more in (("DMAP", {"K": 2}), ("DPS", {})))
    guided, plain = costs.flop("SD 2.0", "KL", (512, 512)), costs.denoiser_flop("SD 2.0", (512, 512))
    decoded = costs.run_flop("SD 2.0", "KL", (512, 512), costs.Cost(denoiser=0, denoiser_gradients=0, decoder=1, decoder_gradients=0))
    assert sd2(jobs, cost=dps.cost(10)).flop() == pytest.approx(10 * guided)
    assert sd2(jobs, cost=dmap.cost(10)).flop() == pytest.approx(18 * guided + 10 * plain + decoded)
    none = sd2(jobs, cost=lab.call("DMAP_DPSSampler", zeta=1.0, jacobian="none", inner=3, guide_start=0.5).cost(10))
    decoder = costs.flop("SD 2.0", "KL", (512, 512), jacobian="none") - plain
    assert none.flop() == pytest.approx(10 * plain + 15 * decoder + decoded)
    with_small = costs.flop("SD 2.0", "TAESD", (512, 512), jacobian="none") - plain
    assert replace(none, guidance="TAESD").flop() == pytest.approx(10 * plain + 15 * with_small + decoded)
    tiled = sd2(jobs, cost=dps.cost(10), size=(1024, 1024), tile=64)
    assert tiled.flop() > 9 * sd2(jobs, cost=dps.cost(10)).flop()


def test_the_first_plan_that_fits(jobs):
    job = sd2(jobs)
    peaks = [job.peak(name) for name in ("fast", "lean", "checkpoint")]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[2]
    assert [job.fitting("auto", room) for room in (1e15, peaks[2], peaks[2] - 1)] == ["fast", "checkpoint", None]
    assert job.fitting("fast", peaks[2]) is None


def test_what_would_fit(jobs):
    large = sd2(jobs, size=(2048, 2048), batch=2)
    found = large.remedies(8 * GIB)
    assert "tile 512" in found and "one picture at a time" not in found
    assert all(job.fitting("auto", 8 * GIB) for job in (replace(large, tile=64),))
    assert sd2(jobs).remedies(0.1 * GIB) == []
    none = jobs.Cost(1, 0, 1, 1)
    assert "jacobian none" in sd2(jobs, spared=none).remedies(4.7 * GIB) and sd2(jobs, cost=none).fitting("fast", 4.7 * GIB)
    assert not any("jacobian" in remedy for remedy in sd2(jobs).remedies(4.7 * GIB))  # of a solver that has no such input


# Gibibytes that a run of LATINO takes in half precision, weights included, and what one gradient step of the decoder alone would.
PLAIN = [
    ("SD 1.5", 512, None, 2.11, 4.6),
    ("SD 1.5", 1024, None, 3.05, 13.2),
    ("SDXL", 1024, None, 6.19, 16.4),
    ("SDXL", 2048, None, 9.94, 50.6),
    ("SDXL", 2048, 128, 6.28, 16.4),
]


@pytest.mark.parametrize("family, size, tile, gib, guided", PLAIN, ids=lambda value: str(value))
def test_a_run_without_a_gradient_needs_far_less(lab, jobs, family, size, tile, gib, guided):
    latino = lab.call("DMAP_LATINOSampler").cost(8)
    job = sd2(jobs, cost=latino, family=family, size=(size, size), tile=tile)
    assert [job.peak(name) for name in ("fast", "lean", "checkpoint")] == [job.peak("fast")] * 3
    assert job.peak("fast") / GIB == pytest.approx(gib, abs=0.05)
    assert replace(job, cost=jobs.Cost(1, 0, 1, 1)).peak("fast") / GIB == pytest.approx(guided, rel=0.03)


def test_what_an_encoder_adds(jobs, costs):
    """PSLD's gradient goes through it while the decoder's activations wait; a ReSample in pixels calls it once, which is less than its gradients."""
    size, none = (512, 512), costs.weight_bytes("SD 2.0", "KL")
    dps, psld, resample = (sd2(jobs, calls=c).peak("fast") for c in ((1, 1, 1, 1), (1, 1, 1, 1, 1, 1), (1, 1, 2, 1, 1)))
    assert dps == resample == costs.peak("SD 2.0", "KL", size, "fp16")
    assert psld - dps == pytest.approx((2989.6 + 1596.4 - 3064.9) * 1e6, rel=1e-3)
    # the result is decoded in any case, and decoders take more than encoders
    assert sd2(jobs, calls=(1, 0, 0, 0)).peak("fast") - none == pytest.approx(335.6e6)
    assert sd2(jobs, calls=(1, 0, 1, 0, 1), size=(2048, 2048)).peak("fast") - none == pytest.approx(335.6e6 * 16)


def test_a_small_decoder_of_gradients_is_in_memory_as_well(jobs, costs):
    """The result is still decoded by the large one."""
    job = sd2(jobs, calls=(1, 0, 1, 1), guidance="TAESD")
    assert job.peak("fast") == pytest.approx(2 * (865_910_724 + 83_653_863 + 2_445_065) + 365.3e6)
    assert replace(job, tile=32).peak("fast") > job.peak("fast") - 365.3e6


@pytest.mark.parametrize("sampler", ["DMAP", "ddpm"])
def test_it_is_said_before_and_in_the_report(lab, sampler, caplog):
    guider = lab.guider()
    with caplog.at_level(logging.INFO):
        lab.sample(guider, lab.dmap() if sampler == "DMAP" else lab.stock(sampler), steps=2)
    assert guider.report.flop > 0 and guider.report.counted_memory > 30e6
    assert any(r.getMessage().endswith("TFLOP and 0.1 GiB at most, counted for demo prior") for r in caplog.records)
    assert " TFLOP and " in guider.report.text()


def test_a_job_that_cannot_fit_is_refused_before_any_work(lab, jobs, monkeypatch):
    module = importlib.import_module("dmap_pack.nodes.host.guider")
    monkeypatch.setattr(module, "room", lambda: 1e6)
    model, calls = lab.counting(lab.shared()[0])
    guider = lab.guider(model=model)
    with pytest.raises(
        ValueError, match=r"DPSGuider: a gradient of 32x32 needs 0.1 GiB with the weights, and there are 0.0. What would fit: a smaller"
    ):
        lab.sample(guider, lab.dps())
    assert not calls


def test_a_run_without_a_gradient_is_not_refused_for_one(lab, jobs, monkeypatch):
    """In a room that its networks' calls fit and no gradient does; in a smaller one nothing is said of gradients."""
    module = importlib.import_module("dmap_pack.nodes.host.guider")
    demo = jobs.Job("demo prior", "TAESD", "TAESD", (32, 32), 1, None, "fp32", "fp32", jobs.Cost(1, 0, 1, 1))
    latino = lab.call("DMAP_LATINOSampler")
    monkeypatch.setattr(module, "room", lambda: (replace(demo, cost=latino.cost(2)).peak("fast") + demo.peak("checkpoint")) / 2)
    with pytest.raises(ValueError, match="DPSGuider: a gradient of 32x32 needs"):
        lab.sample(lab.guider(), lab.call("DMAP_DPSSampler", jacobian="none"), steps=2)
    guider = lab.guider()
    lab.sample(guider, latino, steps=2)
    assert ", memory plan no gradient, counted" in guider.report.text()
    monkeypatch.setattr(module, "room", lambda: 1e6)
    with pytest.raises(
        ValueError, match=r"DPSGuider: a run of 32x32 needs 0.1 GiB with the weights.*What would fit: a smaller picture or model$"
    ):
        lab.sample(lab.guider(), latino, steps=2)


@pytest.mark.parametrize(
    "name, settings, proposed",
    [
        ("LATINO", {}, []),
        ("DPS", {"zeta": 1.0, "jacobian": "exact"}, ["jacobian none", "guidance_vae"]),
        ("DPS", {"zeta": 1.0, "jacobian": "none"}, ["guidance_vae"]),
        ("PSLD", {"zeta": 1.0, "gamma": 0.1}, ["guidance_vae"]),
        ("DSG", {"zeta": 0.1}, ["guidance_vae"]),
    ],
    ids=["LATINO", "exact", "none", "PSLD", "DSG"],
)
def test_memory_that_does_not_suffice_is_told_with_what_the_solver_can_do(lab, name, settings, proposed):
    """Nothing is said of gradients that there are not, nor of inputs that a node does not have."""
    decoder = lab.shared()[1].first_stage_model.taesd_decoder

    def full(_, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = decoder.register_forward_pre_hook(full)
    try:
        with pytest.raises(torch.OutOfMemoryError) as error:
            lab.sample(lab.guider(), lab.call(f"DMAP_{name}Sampler", **settings), steps=2)
    finally:
        hook.remove()
    said = str(error.value)
    assert f"does not suffice for {'a gradient of ' if proposed else ''}the whole picture of 32x32. Try tile auto" in said
    assert [words for words in ("jacobian none", "guidance_vae") if words in said] == proposed


def test_networks_that_were_not_counted_are_not_spoken_of(lab, jobs, monkeypatch):
    monkeypatch.setattr(jobs, "family_of", lambda model: None)
    guider = lab.guider()
    lab.sample(guider, lab.dps(), steps=1)
    assert guider.report.flop is None and "TFLOP" not in guider.report.text()
    assert torch.isfinite(torch.tensor(guider.report.residuals)).all()
