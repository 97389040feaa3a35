"""Operators that need a weights file, JPEG and known noise: from the file to a run."""

import contextlib
import importlib
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.hosts("one")

SIGMA = 2.0
ROOM = 64  # pixels; the smallest room
BLUR = 128
LEARNED = {"NonlinearBlur": {"seed": 3}, "Segmentation": {}}


def core(lab, module):
    return importlib.import_module(f"{lab.core.posterior.__package__}.{module}")


@contextlib.contextmanager
def registered(folder):
    """The folder stands in for models/dmap as long as the context lasts."""
    import folder_paths

    known = folder_paths.folder_names_and_paths["dmap"]
    folder_paths.folder_names_and_paths["dmap"] = ([str(folder)], known[1])
    folder_paths.filename_list_cache.pop("dmap", None)
    try:
        yield folder
    finally:
        folder_paths.folder_names_and_paths["dmap"] = known
        folder_paths.filename_list_cache.pop("dmap", None)


@pytest.fixture
def folder(lab, tmp_path):
    """A folder for weights that has none yet, with a sibling that is none."""
    (tmp_path / "models" / "dmap").mkdir(parents=True)
    with registered(tmp_path / "models" / "dmap") as path:
        yield path


@pytest.fixture(scope="module")
def learned(lab, tmp_path_factory):
    """Weights of the blur's full network, random ones; of a tiny network of rooms, as .safetensors and as a trainer's .ckpt."""
    path = tmp_path_factory.mktemp("dmap")
    blur, rooms = core(lab, "operators.nonlinear_blur"), core(lab, "operators.segmentation")
    blur.save_kernel_wizard(blur.random_kernel_wizard(1), path / "blur.safetensors")
    weights = dict(rooms.random_room_layout(2, layers=(1, 1, 1, 1), width=4, bottleneck=5).state_dict())
    save_file(weights, path / "room.safetensors")
    torch.save({"state_dict": {f"model.{name}": value for name, value in weights.items()}, "epoch": 3}, path / "room.ckpt")
    with registered(path):
        yield path


def operator(lab, node, **inputs):
    return lab.call(f"DMAP_Operator{node}", **inputs)


def segmentation(lab, weights="room.safetensors"):
    return operator(lab, "Segmentation", weights=weights)


def degrade(lab, image, operator, noise_sigma=0.0, seed=0):
    return lab.call("DMAP_Degrade", image=image, operator=operator, noise_sigma=noise_sigma, seed=seed)


def empty(lab, measurement, operator):
    return lab.call("DMAP_EmptyMeasurementLatent", measurement=measurement, operator=operator, vae=lab.shared()[1], batch_size=1)


def refused(*words, error=ValueError):
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*(?:{word}))" for word in words))


# the folder


def test_the_folder_is_known_to_comfyui(lab):
    import folder_paths

    assert folder_paths.get_folder_paths("dmap") == [os.path.join(folder_paths.models_dir, "dmap")]


def listed(lab, node):
    return next(i.options for i in lab.NODES[f"DMAP_Operator{node}"].GET_SCHEMA().inputs if i.id == "weights")


@pytest.mark.parametrize("node", LEARNED)
def test_the_list_has_the_files_of_the_folder(lab, folder, node):
    (placeholder,) = listed(lab, node)
    assert "no file yet" in placeholder
    (folder / "deeper").mkdir()
    for name in ("b.safetensors", "a.pth", "deeper/c.ckpt", "notes.txt"):
        (folder / name).touch()
    assert listed(lab, node) == ["a.pth", "b.safetensors", os.path.join("deeper", "c.ckpt")]
    assert lab.NODES[f"DMAP_Operator{node}"].INPUT_TYPES()["required"]["weights"][1]["options"] == listed(lab, node)


@pytest.mark.parametrize("node", LEARNED)
def test_without_a_file_the_error_says_what_to_do(lab, folder, node):
    example = {"NonlinearBlur": "GOPRO_wVAE.pth", "Segmentation": "the room layout checkpoint"}[node]
    for name in (listed(lab, node)[0], "gone.pth"):
        with refused(str(folder), example, "help page", error=FileNotFoundError) as raised:
            operator(lab, node, weights=name, **LEARNED[node])
        assert ("'gone.pth'" in str(raised.value)) == (name == "gone.pth")


@pytest.mark.parametrize("node", LEARNED)
def test_files_elsewhere_are_not_read(lab, folder, node, monkeypatch):
    """The file would be found by its path, and reading it would fail in another way."""
    outside = folder.parent / "x.pth"
    outside.write_bytes(b"not weights")
    reader = core(lab, "weights")
    monkeypatch.setattr(reader, "_read_pickle", lambda path: pytest.fail(f"{path} was opened"))
    for name in ("../x.pth", "../../models/x.pth", str(outside), "deeper/../../x.pth", "../../../../../../../../etc/passwd", "..", ""):
        with refused(str(folder), error=FileNotFoundError):
            operator(lab, node, weights=name, **LEARNED[node])


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("node", LEARNED)
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_file_with_a_program_is_not_run(lab, folder, node, how):
    marker = folder.parent / "was-run"
    content = {"state_dict": {"weight": torch.ones(2)}, "bomb": Bomb(marker)}
    if how == "torch":
        torch.save(content, folder / "bomb.pth")
    else:
        (folder / "bomb.pth").write_bytes(pickle.dumps(content))
    with refused("bomb.pth", "refused|not a readable") as raised:
        operator(lab, node, weights="bomb.pth", **LEARNED[node])
    assert not marker.exists() and "weights_only" not in str(raised.value)
    torch.load(folder / "bomb.pth", weights_only=False) if how == "torch" else pickle.loads((folder / "bomb.pth").read_bytes())
    assert marker.exists(), "this file would not have done anything anyway"


@pytest.mark.parametrize("node", LEARNED)
def test_a_file_of_something_else(lab, folder, node):
    save_file({"weight": torch.ones(2)}, folder / "other.safetensors")
    with refused("other.safetensors", "lacks [0-9]+ of the [0-9]+ tensors"):
        operator(lab, node, weights="other.safetensors", **LEARNED[node])
    (folder / "half.safetensors").write_bytes(b"\x10\x00\x00")
    with refused("half.safetensors", "download complete"):
        operator(lab, node, weights="half.safetensors", **LEARNED[node])
    torch.save([1, 2], folder / "list.pth")
    with refused("list.pth", "no weights"):
        operator(lab, node, weights="list.pth", **LEARNED[node])


# nonlinear blur


@pytest.fixture(scope="module")
def blurred(lab, learned):
    """(operator, measurement, picture) of the one size that is small enough."""
    with torch.inference_mode():
        made, image = operator(lab, "NonlinearBlur", weights="blur.safetensors", seed=3), lab.picture(height=BLUR, width=BLUR)
        return made, degrade(lab, image, made), image


def test_the_blur_is_the_networks(lab, learned, blurred):
    made, measurement, image = blurred
    blur = core(lab, "operators.nonlinear_blur")
    with torch.inference_mode(False), torch.no_grad():
        network = blur.random_kernel_wizard(1)
        expected = blur.NonlinearBlur(network, 3)(lab.as_core(image.clone()))
    torch.testing.assert_close(lab.as_core(measurement), expected, rtol=0, atol=1e-5)
    assert float((measurement - image).abs().max()) > 0.02
    assert made.describe() == "Nonlinear Blur (blur.safetensors, seed 3)"
    assert not any(p.is_inference() or p.requires_grad for p in made.network.parameters())


@pytest.mark.thorough
@pytest.mark.hosts("all")
def test_a_step_through_the_blur(lab, learned, blurred):
    made, measurement, _ = blurred
    latent, width, height = empty(lab, measurement, made)
    assert (width, height) == (BLUR, BLUR)
    residuals = []
    for zeta in (0.5, 0.001):
        guider = lab.guider(operator=made, measurement=measurement)
        result = lab.sample(guider, lab.dmap(zeta=zeta, K=1), latent=latent, schedule=torch.tensor([2.0, 1.9, 0.0]))
        assert torch.isfinite(result).all() and "blur.safetensors" in guider.report.operator
        residuals.append(guider.report.residuals[-1][0])
    assert residuals[0] < residuals[1]
    assert all(p.grad is None for p in made.network.parameters())


def test_sizes_that_the_networks_do_not_take(lab, learned, blurred):
    for made, multiple in ((blurred[0], BLUR), (segmentation(lab), ROOM)):
        with refused("96x32", f"multiples of {multiple}"):
            degrade(lab, lab.picture(height=32, width=96), made)
        with refused("96x32", f"multiples of {multiple}"):
            empty(lab, lab.picture(height=32, width=96) if multiple == BLUR else labels_picture(lab, 32, 96), made)


# segmentation


def palette(lab):
    return torch.tensor(core(lab, "operators.segmentation").PALETTE, dtype=torch.float32)


def labels(height=ROOM, width=ROOM):
    """(H, W) of all five classes: walls from left to right, the ceiling above and the floor below."""
    found = torch.tensor([1, 0, 2])[torch.arange(width) * 3 // width].repeat(height, 1)
    found[: height // 4], found[-height // 4 :] = 4, 3
    return found


def labels_picture(lab, height=ROOM, width=ROOM):
    return palette(lab)[labels(height, width)][None] / 255


def of_masks(name, **inputs):
    """The output of a node of ComfyUI that makes masks."""
    from comfy_extras import nodes_mask

    cls = getattr(nodes_mask, name)
    output = cls.execute(**inputs).result if hasattr(cls, "define_schema") else getattr(cls(), cls.FUNCTION)(**inputs)
    return output[0]


def masks(lab):
    """What nodes of ComfyUI make of the label picture: a mask for each colour, all of them in a batch."""
    picture, batch = labels_picture(lab), None
    for red, green, blue in palette(lab).int().tolist():
        image = of_masks("MaskToImage", mask=of_masks("ImageColorToMask", image=picture, color=(red << 16) + (green << 8) + blue))
        batch = image if batch is None else lab.call("ImageBatch", image1=batch, image2=image)
    return of_masks("ImageToMask", image=batch, channel="red")


@pytest.mark.parametrize("weights", ["room.safetensors", "room.ckpt"])
def test_degrade_paints_the_labels(lab, learned, weights):
    made, image = segmentation(lab, weights), lab.picture(seed=4, height=ROOM, width=2 * ROOM)
    measurement = degrade(lab, image, made)
    network = core(lab, "operators.segmentation").random_room_layout(2, layers=(1, 1, 1, 1), width=4, bottleneck=5)
    best = network(lab.as_core(image)).argmax(1)
    assert len(best.unique()) > 1, "this picture has one class"
    torch.testing.assert_close(measurement * 255, palette(lab)[best], rtol=0, atol=1e-3)
    saved = (measurement * 255).round() / 255  # as PNG
    for picture in (measurement, saved):
        y = lab.guider(operator=made, measurement=picture).y
        assert torch.equal(y[:, 0].long(), best)


def test_a_label_picture_and_masks_are_the_same_measurement(lab, learned):
    made, five = segmentation(lab), masks(lab)
    assert five.shape == (5, ROOM, ROOM)
    pictures = lab.guider(operator=made, measurement=torch.cat([labels_picture(lab), labels_picture(lab).flip(2)])).y
    assert torch.equal(pictures[0, 0].long(), labels())
    assert torch.equal(lab.guider(operator=made, measurement=five).y, pictures[:1])
    assert torch.equal(lab.guider(operator=made, measurement=torch.cat([five, five.flip(2)])).y, pictures)


def test_the_latent_of_masks(lab, learned):
    made, five = segmentation(lab), masks(lab)
    for measurement, batch in ((five, 1), (torch.cat([five, five]), 2), (labels_picture(lab), 1)):
        latent, width, height = empty(lab, measurement, made)
        assert latent["samples"].shape == (batch, 4, ROOM // 8, ROOM // 8) and (width, height) == (ROOM, ROOM)


def test_label_pictures_are_resized_with_nearest_exact_only(lab, learned):
    made = segmentation(lab)
    larger = {
        method: lab.call("ImageScale", image=labels_picture(lab), upscale_method=method, width=2 * ROOM, height=2 * ROOM, crop="disabled")
        for method in ("nearest-exact", "bilinear")
    }
    y = lab.guider(operator=made, measurement=larger["nearest-exact"]).y
    assert torch.equal(y[0, 0].long(), labels().repeat_interleave(2, 0).repeat_interleave(2, 1))
    with refused("measurement", "colour of no class", "nearest-exact", "PNG"):
        lab.guider(operator=made, measurement=larger["bilinear"])


def test_unknown_colours_and_masks_that_do_not_fit(lab, learned):
    made, five = segmentation(lab), masks(lab)
    other = labels_picture(lab)
    other[0, 5, 7] = torch.tensor([0.0, 1.0, 0.0])
    for node in (lambda **m: lab.guider(operator=made, **m), lambda **m: empty(lab, operator=made, **m)):
        with refused("measurement", "1 of 4096 pixels", r"\(0, 255, 0\)", "frontal"):
            node(measurement=other)
        with refused("measurement", "RGB"):
            node(measurement=lab.picture(height=ROOM, width=ROOM))
        with refused("measurement", r"\(4, 64, 64\)", "one mask per class", "frontal, left, right, floor, ceiling"):
            node(measurement=five[:4])
        with refused("measurement", "exactly one", "4096 pixels are in none"):
            node(measurement=torch.zeros_like(five))
        with refused("measurement", "exactly one", "in several"):
            node(measurement=torch.ones_like(five))


def test_masks_for_another_operator(lab, learned):
    for made in (lab.problem()["operator"], operator(lab, "Jpeg", quality=20, subsampling="4:2:0")):
        for node in (lambda **m: lab.guider(**m), lambda **m: empty(lab, **m)):
            with refused("measurement", "a mask was given", "damaged picture"):
                node(operator=made, measurement=torch.zeros(5, ROOM, ROOM))


def test_a_run_towards_labels(lab, learned):
    made, latent = segmentation(lab), lab.empty(height=ROOM // 8, width=ROOM // 8)
    schedule, results, residuals = torch.tensor([2.0, 1.9, 0.0]), [], []
    for measurement, zeta in ((labels_picture(lab), 2.0), (masks(lab), 2.0), (masks(lab), 0.001)):
        guider = lab.guider(operator=made, measurement=measurement)
        results.append(lab.sample(guider, lab.dmap(zeta=zeta, K=3), latent=latent, schedule=schedule))
        residuals.append(guider.report.residuals[0][0])
    assert torch.isfinite(results[0]).all() and torch.equal(results[0], results[1])
    assert residuals[0] < residuals[2]


@pytest.mark.parametrize("kind", ["blur", "room"])
def test_the_gradient_through_a_learned_operator(lab, learned, blurred, kind):
    """Inside ComfyUI's inference mode it is the slope of the residual."""
    size, step = {"blur": (BLUR, 0.1), "room": (ROOM, 0.5)}[kind]
    made, measurement = blurred[:2] if kind == "blur" else (segmentation(lab), labels_picture(lab))
    problem = {"operator": made, "measurement": measurement}
    z = SIGMA * torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(1))
    stock, network = lab.stock_guider(**problem), lab.shared()[1].first_stage_model
    guider = lab.guider(zeta=1.0, **problem)
    grad = lab.probe(stock, z, SIGMA) - lab.probe(guider, z, SIGMA)
    norm = float(grad.norm())
    assert norm > 1e-3

    def residual(z):
        denoised = stock.model_patcher.model.process_latent_out(lab.probe(stock, z, SIGMA))
        return float(made.distance(made(network.decode(denoised)), guider.y).double())

    assert (residual(z + step * grad / norm) - residual(z - step * grad / norm)) / (2 * step) == pytest.approx(norm, rel=0.03)


# JPEG


def test_jpeg_in_a_graph(lab):
    made = operator(lab, "Jpeg", quality=15, subsampling="4:2:0", rounding="straight-through")
    image = lab.picture(height=20, width=44)
    measurement = degrade(lab, image, made)
    expected = lab.core.operators.Jpeg(15, "4:2:0", "straight-through")(lab.as_core(image))
    torch.testing.assert_close(lab.as_core(measurement), expected, rtol=0, atol=1e-6)
    levels = measurement * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)  # as a decoder gives it
    latent, width, height = empty(lab, measurement, made)
    assert (width, height) == (44, 20) and latent["samples"].shape[-2:] == (3, 6)


@pytest.mark.parametrize("rounding", ["straight-through", "cubic"])
def test_jpeg_guides(lab, rounding):
    made, residuals = operator(lab, "Jpeg", quality=40, subsampling="4:4:4", rounding=rounding), []
    for zeta in (0.3, 0.001):
        guider = lab.guider(operator=made, measurement=degrade(lab, lab.picture(), made))
        lab.sample(guider, lab.dmap(zeta=zeta, K=3), schedule=torch.tensor([2.0, 1.9, 0.0]))
        residuals.append(guider.report.residuals[0][0])
    assert residuals[0] < residuals[1]


def test_a_jpeg_that_is_none(lab):
    for settings, words in (({"quality": 0}, ["quality"]), ({"quality": 101}, ["quality"]), ({"subsampling": "4:1:1"}, ["4:2:2"])):
        with refused(*words):
            operator(lab, "Jpeg", **{"quality": 20, "subsampling": "4:2:0", **settings})


# known noise


def blurry(lab):
    return operator(lab, "GaussianBlur", sigma=1.0, kernel_size=9)


@pytest.mark.parametrize(("more", "total"), [(0.0, 0.04), (0.03, 0.05)])
def test_degrade_adds_the_noise_that_is_known(lab, more, total):
    image = lab.picture(height=ROOM, width=ROOM)
    noisy = operator(lab, "Noise", operator=blurry(lab), sigma=0.04)
    noise = degrade(lab, image, noisy, more, seed=5) - degrade(lab, image, blurry(lab))
    assert abs(float(noise.mean())) < 5 * total / noise.numel() ** 0.5
    assert float(noise.std()) == pytest.approx(total, rel=5 / (2 * noise.numel()) ** 0.5)
    plain = degrade(lab, image, blurry(lab), total, seed=5)  # the same noise, by Degrade's own setting
    torch.testing.assert_close(degrade(lab, image, noisy, more, seed=5), plain, rtol=0, atol=1e-6)


def test_the_residual_is_what_noise_does_not_explain(lab):
    sigma, schedule = 0.02, torch.tensor([2.0, 1.0, 0.0])
    measurement = degrade(lab, lab.picture(), operator(lab, "Noise", operator=blurry(lab), sigma=sigma))
    residuals = {}
    for name, made in (("plain", blurry(lab)), ("known", operator(lab, "Noise", operator=blurry(lab), sigma=sigma))):
        guider = lab.guider(operator=made, measurement=measurement)
        lab.sample(guider, lab.dps(zeta=0.001), schedule=schedule)
        residuals[name] = guider.report.residuals[0][0]
    explained = 2 * sigma * measurement.numel() ** 0.5
    assert residuals["known"] == pytest.approx(residuals["plain"] - explained, rel=1e-4) and residuals["known"] > 0


def test_where_only_noise_is_left_nothing_is_guided(lab):
    """The noise is said to be so large that any picture explains the measurement: a run is then the same for every zeta."""
    made, results = operator(lab, "Noise", operator=blurry(lab), sigma=1.0), []
    for zeta in (0.1, 5.0):
        guider = lab.guider(operator=made, measurement=lab.picture())
        results.append(lab.sample(guider, lab.dps(zeta=zeta), schedule=torch.tensor([2.0, 1.0, 0.0])))
        assert guider.report.residuals == [[0.0], [0.0]]
    assert torch.equal(*results)


def test_noise_that_has_no_meaning(lab, learned):
    noisy = operator(lab, "Noise", operator=blurry(lab), sigma=0.1)
    with refused("noisy already"):
        operator(lab, "Noise", operator=noisy, sigma=0.1)
    with refused("Noise|Noisy", "Compose", "last"):
        lab.call("DMAP_OperatorCompose", first=noisy, second=blurry(lab))
    room, image = segmentation(lab), lab.picture(height=ROOM, width=ROOM)
    with refused("no noise level", "leave the noise at 0"):
        degrade(lab, image, room, 0.1)
    noisy_room = operator(lab, "Noise", operator=room, sigma=0.1)
    with refused("no noise level"):
        degrade(lab, image, noisy_room)
    model, calls = lab.counting(lab.shared()[0])
    guider = lab.guider(model=model, operator=noisy_room, measurement=labels_picture(lab))
    with refused("known noise belongs to measured values", "leave the noise at 0"):
        lab.sample(guider, lab.dps(), latent=lab.empty(height=ROOM // 8, width=ROOM // 8))
    assert calls == []
