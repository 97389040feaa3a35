"""Costs of steps that are put together from counted constants; tests/nodes/test_benchmarks.py counts some of them again."""

import pytest

from dmap_core import costs
from dmap_core.gradient import STRATEGIES
from dmap_core.posterior import JACOBIANS

SIZES = [(512, 512), (1024, 1024), (2048, 2048)]


def test_a_step_of_stable_diffusion_at_512():
    assert costs.flop("SD 2.0", "KL", (512, 512)) == pytest.approx(6.87e12, rel=0.01)
    assert costs.peak("SD 2.0", "KL", (512, 512)) / 2**30 == pytest.approx(5.30, abs=0.01)  # counted as a whole, fp16
    assert costs.weight_bytes("SD 2.0", "KL", "fp16") == 2 * (865_910_724 + 83_653_863)


# What graphics cards have: gibibytes that are enough in half precision, batch 1, weights included.
GOALS = [
    ("SD 2.0", 512, "fast", None, 6),
    ("SD 2.0", 512, "lean", None, 6),
    ("SD 2.0", 512, "checkpoint", None, 4),
    ("SD 1.5", 512, "checkpoint", None, 4),
    ("SD 2.0", 1024, "checkpoint", None, 8),
    ("SD 2.0", 2048, "fast", 64, 12),
    ("SDXL", 1024, "checkpoint", None, 12),
]


@pytest.mark.parametrize("family, size, strategy, tile, gib", GOALS)
def test_goals(family, size, strategy, tile, gib):
    assert costs.peak(family, "KL", (size, size), "fp16", strategy, tile) <= gib * 2**30


@pytest.mark.parametrize("family", costs.FAMILIES)
@pytest.mark.parametrize("decoder", costs.DECODERS)
def test_leaner_strategies_need_less_and_compute_more(family, decoder):
    for size in SIZES:
        for dtype in ("fp16", "bf16", "fp32"):
            peaks = [costs.peak(family, decoder, size, dtype, strategy) for strategy in STRATEGIES]
            assert peaks == sorted(peaks, reverse=True)
        for jacobian in JACOBIANS:
            assert costs.flop(family, decoder, size, jacobian=jacobian) > costs.denoiser_flop(family, size)
        operations = [costs.flop(family, decoder, size, strategy) for strategy in STRATEGIES]
        assert operations == sorted(operations)
        assert costs.peak(family, decoder, size, jacobian="none") <= costs.peak(family, decoder, size)


def test_tiles_need_the_memory_of_one_and_the_operations_of_all():
    tiled = costs.peak("SD 2.0", "KL", (2048, 2048), tile=64)
    assert costs.peak("SD 2.0", "KL", (512, 512), strategy="lean") < tiled < costs.peak("SD 2.0", "KL", (512, 512))
    # 25 tiles of the denoiser and 25 of the decoder: more than the area's, but attention stays within them
    assert 25 * costs.flop("SD 2.0", "KL", (512, 512)) < costs.flop("SD 2.0", "KL", (2048, 2048), tile=64)
    assert costs.denoiser_flop("SD 2.0", (2048, 2048), tile=64) < costs.denoiser_flop("SD 2.0", (2048, 2048))
    assert costs.peak("SD 2.0", "KL", (512, 512), tile=64) == costs.peak("SD 2.0", "KL", (512, 512))  # one tile is the whole


def calls(**more):
    return costs.Cost(**{"denoiser": 0, "denoiser_gradients": 0, "decoder": 0, "decoder_gradients": 0, **more})


def test_a_run_is_the_sum_of_its_calls():
    """By hand, from the table of docs/performance.md: SD 2.0 at 1024x1024, an area of 4."""
    size, tera = (1024, 1024), costs.TERA
    decoded, encoded = 2.4802 * 4 + 0.03436 * 16, 1.0823 * 4 + 0.03436 * 16
    back = {"decoder": 2.4802 * 4 + 0.085899 * 16, "encoder": 1.0823 * 4 + 0.085899 * 16}
    latino = calls(denoiser=8, decoder=8, encoder=8)
    plain = 8 * costs.denoiser_flop("SD 2.0", size) / tera
    assert costs.run_flop("SD 2.0", "KL", size, latino) / tera == pytest.approx(plain + 8 * (decoded + encoded))
    psld = calls(decoder=3, decoder_gradients=2, encoder=5, encoder_gradients=4)
    found = [costs.run_flop("SD 2.0", "KL", size, psld, strategy) / tera for strategy in STRATEGIES]
    expected = 3 * decoded + 2 * back["decoder"] + 5 * encoded + 4 * back["encoder"]
    assert found == pytest.approx([expected, expected, expected + 2 * decoded + 4 * encoded])
    assert costs.run_flop("SD 2.0", "KL", size, latino, batch=3) == pytest.approx(3 * costs.run_flop("SD 2.0", "KL", size, latino))


def test_a_decoder_of_gradients_alone():
    """Pictures that nobody differentiates, and latents, are the run's own autoencoder's."""
    size = (512, 512)
    both = costs.run_flop("SD 1.5", "KL", size, calls(decoder=7, decoder_gradients=5, encoder=2), guidance="TAESD")
    plain = costs.run_flop("SD 1.5", "KL", size, calls(decoder=2, encoder=2))
    assert both == pytest.approx(plain + costs.run_flop("SD 1.5", "TAESD", size, calls(decoder=5, decoder_gradients=5)))


@pytest.mark.parametrize("network", ["decoder", "encoder"])
def test_tiles_without_a_gradient_run_once(network):
    """25 of 64 latents."""
    call = calls(**{network: 1})
    tile = costs.run_flop("SD 2.0", "KL", (512, 512), call)
    assert costs.run_flop("SD 2.0", "KL", (2048, 2048), call, tile=64) == pytest.approx(25 * tile)


def test_a_batch_multiplies_everything_but_weights():
    one, four = (costs.peak("SDXL", "KL", (1024, 1024), batch=batch) - costs.weight_bytes("SDXL", "KL") for batch in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.02)
    assert costs.flop("SDXL", "KL", (1024, 1024), batch=4) == 4 * costs.flop("SDXL", "KL", (1024, 1024))


def test_a_run_without_gradients_needs_the_largest_of_its_calls():
    """LATINO's: in fp16 the KL decoder's at its full size, 335.6 MB per 512x512."""
    latino = calls(denoiser=8, decoder=8, encoder=8)
    for size in SIZES:
        found = {costs.run_peak("SD 1.5", "KL", size, latino, strategy=strategy) for strategy in STRATEGIES}
        assert found == {costs.weight_bytes("SD 1.5", "KL") + 335.6e6 * costs.area(size)}
        assert found.pop() < costs.peak("SD 1.5", "KL", size, strategy="checkpoint", jacobian="none")


def test_a_decoder_in_another_precision():
    both = costs.peak("SD 2.0", "KL", (512, 512), "fp32", "lean")
    assert (
        costs.peak("SD 2.0", "KL", (512, 512), "fp16", "lean")
        < costs.peak("SD 2.0", "KL", (512, 512), "fp16", "lean", vae_dtype="fp32")
        < both
    )
