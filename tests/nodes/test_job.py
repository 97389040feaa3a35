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


def sd2(jobs, **changes):
    job = jobs.Job("SD 2.0", "KL", "KL", (512, 512), 1, None, "fp16", "bf16", True)
    return replace(job, **changes)


def test_the_demo_prior_is_known(lab, jobs):
    model, vae = lab.shared()
    assert (jobs.family_of(model), jobs.decoder_of(vae)) == ("demo prior", "TAESD")


def test_operations_are_those_of_its_calls(lab, jobs, costs):
    dmap, dps = (lab.call(f"DMAP_{name}Sampler", zeta=1.0, **more) for name, more in (("DMAP", {"K": 2}), ("DPS", {})))
    job = sd2(jobs)
    guided, plain = costs.flop("SD 2.0", "KL", (512, 512)), costs.denoiser_flop("SD 2.0", (512, 512))
    decoded = costs.run_flop("SD 2.0", "KL", (512, 512), costs.Cost(denoiser=0, denoiser_gradients=0, decoder=1, decoder_gradients=0))
    assert job.flop(dps.cost(10)) == pytest.approx(10 * guided)
    assert job.flop(dmap.cost(10)) == pytest.approx(18 * guided + 10 * plain + decoded)
    none = lab.call("DMAP_DPSSampler", zeta=1.0, jacobian="none", inner=3, guide_start=0.5)
    decoder = costs.flop("SD 2.0", "KL", (512, 512), jacobian="none") - plain
    assert replace(job, through_denoiser=False).flop(none.cost(10)) == pytest.approx(10 * plain + 15 * decoder + decoded)
    small = replace(job, through_denoiser=False, guidance="TAESD")
    with_small = costs.flop("SD 2.0", "TAESD", (512, 512), jacobian="none") - plain
    assert small.flop(none.cost(10)) == pytest.approx(10 * plain + 15 * with_small + decoded)
    tiled = replace(job, size=(1024, 1024), tile=64)
    assert tiled.flop(dps.cost(10)) > 9 * job.flop(dps.cost(10))


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


def test_networks_that_were_not_counted_are_not_spoken_of(lab, jobs, monkeypatch):
    monkeypatch.setattr(jobs, "family_of", lambda model: None)
    guider = lab.guider()
    lab.sample(guider, lab.dps(), steps=1)
    assert guider.report.flop is None and "TFLOP" not in guider.report.text()
    assert torch.isfinite(torch.tensor(guider.report.residuals)).all()
