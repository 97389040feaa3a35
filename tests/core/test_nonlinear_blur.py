"""The nonlinear blur. Most tests use a narrow network; the layout of the published weights is checked on the full one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dmap_core.operators import nonlinear_blur
from dmap_core.operators.nonlinear_blur import (
    KernelWizard,
    NonlinearBlur,
    convert,
    load_kernel_wizard,
    random_kernel_wizard,
    save_kernel_wizard,
)

WIDTH, FRONT, BACK = 4, 1, 2
LAYOUT = {"width": WIDTH, "front": FRONT, "back": BACK}


def published_shapes(width, front, back):
    """Names and shapes of the published weights, without those of the kernel extractor, written down from the layers' description."""
    w = width
    shapes = {}

    def conv(name, *shape, bias=True, outputs=0):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = (shape[outputs],)

    conv("feature_extractor.0", w, 3, 3, 3)
    conv("feature_extractor.2", w, w, 3, 3)
    conv("feature_extractor.4", w, w, 3, 3)
    for i in range(6, 6 + front):
        conv(f"feature_extractor.{i}.conv1", w, w, 3, 3)
        conv(f"feature_extractor.{i}.conv2", w, w, 3, 3)
    conv("adapter.model.down.0", w, w, 4, 4, bias=False)
    conv("adapter.model.up.1", 2 * w, w, 4, 4, outputs=1)
    for depth, (outer, inner) in enumerate([(w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w), (8 * w, 8 * w)], start=1):
        level = "adapter.model" + depth * ".submodule"
        conv(f"{level}.down.1", inner, outer, 4, 4, bias=False)
        conv(f"{level}.up.1", 2 * inner, outer, 4, 4, bias=False)
    for i in range(back):
        conv(f"recon_trunk.{i}.conv1", w, w, 3, 3)
        conv(f"recon_trunk.{i}.conv2", w, w, 3, 3)
    conv(f"recon_trunk.{back}", 4 * w, w, 3, 3)
    conv(f"recon_trunk.{back + 3}", 4 * w, w, 3, 3)
    conv(f"recon_trunk.{back + 6}", w, w, 3, 3)
    conv(f"recon_trunk.{back + 8}", 3, w, 3, 3)
    return shapes


def reference(p, image, kernel, front=FRONT, back=BACK):
    """The network as plain function calls on its weights `p`."""

    def conv(name, x, stride=1, padding=1):
        return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), stride=stride, padding=padding)

    def block(name, x):
        return x + conv(f"{name}.conv2", torch.clamp(conv(f"{name}.conv1", x), min=0))

    def leaky(x, slope):
        return torch.where(x > 0, x, slope * x)

    def up(name, x):
        return F.conv_transpose2d(torch.clamp(x, min=0), p[f"{name}.up.1.weight"], p.get(f"{name}.up.1.bias"), stride=2, padding=1)

    x = leaky(conv("feature_extractor.0", image), 0.1)
    x = leaky(conv("feature_extractor.2", x, stride=2), 0.1)
    x = leaky(conv("feature_extractor.4", x, stride=2), 0.1)
    for i in range(front):
        x = block(f"feature_extractor.{6 + i}", x)

    names = ["adapter.model" + depth * ".submodule" for depth in range(5)]
    levels = [conv(f"{names[0]}.down.0", x, stride=2)]
    for name in names[1:]:
        levels.append(conv(f"{name}.down.1", leaky(levels[-1], 0.2), stride=2))
    x = torch.cat([levels.pop(), kernel.repeat(len(image), 1, 1, 1)], 1)
    for name in reversed(names[1:]):
        x = torch.cat([up(name, x), levels.pop()], 1)
    x = torch.tanh(up(names[0], x))

    for i in range(back):
        x = block(f"recon_trunk.{i}", x)
    for i in (back, back + 3):
        x = leaky(F.pixel_shuffle(conv(f"recon_trunk.{i}", x), 2), 0.1)
    return image + conv(f"recon_trunk.{back + 8}", leaky(conv(f"recon_trunk.{back + 6}", x), 0.1))


def picture(size=(128, 128), batch=1, seed=0, dtype=torch.float32):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


@pytest.fixture
def network():
    return random_kernel_wizard(0, **LAYOUT)


@pytest.fixture(scope="module")
def full():
    return random_kernel_wizard(0)


@pytest.fixture(scope="module")
def full_file(full, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "full.safetensors"
    save_kernel_wizard(full, path)
    return path


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_weights_are_those_of_the_published_file(full):
    found = shapes_of(full.state_dict())
    assert found == published_shapes(64, 10, 20)
    assert len(found) == 145
    assert sum(p.numel() for p in full.parameters()) == 23_662_531


def test_a_narrow_network_has_the_same_layout(network):
    assert shapes_of(network.state_dict()) == published_shapes(**LAYOUT)


@pytest.mark.parametrize("size", [(128, 128), (256, 128)])
def test_forward_is_that_of_the_reference(network, size):
    network.double()
    image = (picture(size, batch=2, dtype=torch.float64) + 1) / 2
    generator = torch.Generator().manual_seed(3)
    code = torch.randn((1, 8 * WIDTH, size[0] // 128, size[1] // 128), generator=generator, dtype=torch.float64)
    # Biases and weights that are all of the same order, so that none of them goes unnoticed.
    state = {name: p + 0.1 * torch.randn(p.shape, generator=generator) for name, p in network.state_dict().items()}
    network.load_state_dict(state)
    wanted = reference(state, image, code)
    assert (wanted - image).abs().mean() > 0.05
    torch.testing.assert_close(network(image, code), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(128, 128), (128, 256)])
def test_operator_is_the_network_between_maps_of_ranges(network, size):
    x = picture(size, batch=2)
    f = NonlinearBlur(network, seed=7)
    code = 1.2 * torch.randn((1, 8 * WIDTH, size[0] // 128, size[1] // 128), generator=torch.Generator().manual_seed(7))
    wanted = (reference(network.state_dict(), (x + 1) / 2, code) * 2 - 1).clamp(-1, 1)
    torch.testing.assert_close(f(x), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(f.measure(x), f(x))


def test_measurement_is_clamped_and_the_input_is_not(network):
    f = NonlinearBlur(network)
    x = 3 * picture()
    y = f(x)
    assert y.min() == -1 and y.max() == 1
    assert not torch.equal(y, f(x.clamp(-1, 1)))


def test_code_of_the_published_network():
    with torch.device("meta"):
        network = KernelWizard()
    assert network.stride == 128
    assert NonlinearBlur(network).kernel((256, 256)).shape == (1, 512, 2, 2)
    code = NonlinearBlur(network).kernel((512, 768))
    assert code.shape == (1, 512, 4, 6)
    assert code.std().item() == pytest.approx(1.2, rel=0.02) and code.mean().abs() < 0.05


def test_one_seed_is_one_blur(network):
    x = picture()
    y = NonlinearBlur(network, 5)(x)
    f = NonlinearBlur(network, 5)
    assert torch.equal(f(x), y) and torch.equal(f(x), y)
    assert (NonlinearBlur(network, 6)(x) - y).abs().max() > 1e-3
    torch.manual_seed(99)
    assert torch.equal(f(x), y)


def test_all_pictures_of_a_batch_have_the_same_blur(network):
    f = NonlinearBlur(network, 2)
    x = picture(batch=3)
    torch.testing.assert_close(f(x), torch.cat([f(one[None]) for one in x]), rtol=1e-5, atol=1e-6)
    twins = f(x[:1].expand(2, -1, -1, -1))
    torch.testing.assert_close(twins[0], twins[1], rtol=1e-5, atol=1e-6)


def test_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    network = random_kernel_wizard(3, **LAYOUT)
    NonlinearBlur(network)(picture())
    save_kernel_wizard(network, tmp_path / "w.safetensors")
    load_kernel_wizard(tmp_path / "w.safetensors", **LAYOUT)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_depend_on_their_seed_alone():
    once, again, other = (NonlinearBlur(random_kernel_wizard(seed, **LAYOUT)).sha256 for seed in (4, 4, 5))
    assert once == again != other


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_default_dtype_does_not_change_anything(network, default):
    wanted = NonlinearBlur(network).kernel((128, 128)), network.state_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        again = random_kernel_wizard(0, **LAYOUT)
        assert torch.equal(NonlinearBlur(again).kernel((128, 128)), wanted[0])
    finally:
        torch.set_default_dtype(before)
    assert all(p.dtype == torch.float32 and torch.equal(p, wanted[1][name]) for name, p in again.state_dict().items())


def test_random_weights_of_the_full_network_distort_visibly_and_keep_the_range(full):
    axis = torch.linspace(-1, 1, 128)
    x = torch.stack([torch.sin(9 * axis).expand(128, 128), axis[:, None].sign().expand(128, 128), axis[:, None] * axis])[None] * 0.7
    with torch.no_grad():
        y = NonlinearBlur(full)(x)
    assert 0.05 < (y - x).square().mean().sqrt() < 0.5
    assert (y.abs() == 1).float().mean() < 0.25


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((100, 128), "128x128"), ((128, 250), "256x128"), ((512, 1000), "1024x512"), ((30, 30), "128x128"), ((0, 128), "128x128")],
)
def test_sizes_that_the_network_cannot_take(network, size, nearest):
    f = NonlinearBlur(network)
    message = rf"picture is {size[1]}x{size[0]}; width and height must be multiples of 128\. The nearest size is {nearest}"
    for ask in (
        f.measurement_size,
        f.check,
        f.kernel,
        lambda size: f(torch.zeros(1, 3, *size)),
        lambda size: f.image_size(torch.zeros(1, 3, *size)),
    ):
        with pytest.raises(ValueError, match=message):
            ask(size)


def test_what_solvers_ask(network):
    f = NonlinearBlur(network, seed=3, weights="w.pth")
    y = f(picture((128, 256), batch=2))
    assert not f.linear
    assert f.measurement_size((128, 256)) == (128, 256) == f.image_size(y) == tuple(y.shape[-2:])
    assert f.check((128, 256), batch=2) is None
    assert f.channels() == 3 == y.shape[1]
    assert f.hint(y) is y and f.picture(y) is y and f.read(y) is y
    assert f.describe() == "Nonlinear Blur (w.pth, seed 3)"
    assert "no file" in NonlinearBlur(network).describe()
    with pytest.raises(NotImplementedError, match="no adjoint"):
        f.adjoint(y, (128, 256))


def test_grey_pictures_are_refused(network):
    f = NonlinearBlur(network)
    with pytest.raises(ValueError, match="1 channel.*Put Grayscale after it"):
        f.channels(1)
    with pytest.raises(ValueError, match="1 channel"):
        f(picture()[:, :1])


@pytest.mark.parametrize("seed", [-1, 0.5, "3", None, 2**64, float("nan")])
def test_seeds_that_are_none(network, seed):
    with pytest.raises(ValueError, match="NonlinearBlur: seed"):
        NonlinearBlur(network, seed)


def test_the_largest_seed(network):
    assert torch.isfinite(NonlinearBlur(network, 2**64 - 1).kernel((128, 128))).all()


def test_computed_in_the_dtype_of_the_network(network):
    f, x = NonlinearBlur(network), picture(dtype=torch.float64)
    assert f(x).dtype == torch.float64
    assert torch.equal(f(x).float(), f(x.float()))
    assert f(x.bfloat16()).dtype == torch.bfloat16
    single = f(x)
    network.double()
    assert 0 < (f(x) - single).abs().max() < 1e-4


def test_gradient_is_that_of_finite_differences(network):
    f = NonlinearBlur(network.double(), seed=1)
    x = picture(dtype=torch.float64).mul(0.5).requires_grad_()
    y = f(x)
    generator = torch.Generator().manual_seed(5)
    probe = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad((y * probe).sum(), x)
    for _ in range(3):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * direction
        with torch.no_grad():
            slope = ((f(x + step) - f(x - step)) * probe).sum() / 2e-6
        assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_clamped_pixels_have_no_gradient(network):
    f = NonlinearBlur(network)
    x = (3 * picture()).requires_grad_()
    y = f(x)
    clamped = (y.detach().abs() == 1).float()
    assert clamped.any()
    (grad,) = torch.autograd.grad((y * clamped).sum(), x)
    assert not grad.any()


@pytest.mark.parametrize("kind", ["random", "pth", "safetensors"])
def test_networks_made_and_used_under_inference_mode_give_gradients_later(network, tmp_path, kind):
    path = tmp_path / f"w.{kind}"
    if kind == "pth":
        torch.save(network.state_dict(), path)
    if kind == "safetensors":
        save_kernel_wizard(network, path)
    with torch.inference_mode():
        f = NonlinearBlur(random_kernel_wizard(0, **LAYOUT) if kind == "random" else load_kernel_wizard(path, **LAYOUT)).to("cpu")
        y = f(picture())
    assert torch.equal(NonlinearBlur(network)(picture()), y)
    x = picture(seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(f.distance(f(x), y).sum(), x)
    assert torch.isfinite(grad).all() and grad.abs().max() > 0
    assert not any(p.requires_grad or p.is_inference() for p in f.network.parameters())


def test_moving_takes_the_network_along(network):
    f = NonlinearBlur(network, 4, "w.pth")
    with torch.inference_mode():
        assert f.to("meta") is f
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert not any(p.is_inference() for p in network.parameters())
    assert f(picture().to("meta")).shape == (1, 3, 128, 128)


def kernel_extractor(width):
    """Some of the tensors of the published file that the blur does not need."""
    return {"kernel_extractor.model.1.weight": torch.zeros(width, 2 * width, 7, 7)}


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"params": t}, lambda t: {f"module.{name}": tensor for name, tensor in t.items()}])
def test_published_checkpoints(network, tmp_path, wrap):
    torch.save(wrap({**kernel_extractor(WIDTH), **network.state_dict()}), tmp_path / "w.pth")
    loaded = load_kernel_wizard(tmp_path / "w.pth", **LAYOUT)
    assert torch.equal(NonlinearBlur(loaded)(picture()), NonlinearBlur(network)(picture()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_weights_of_another_layout_are_refused(network, tmp_path):
    path = tmp_path / "w.safetensors"
    save_kernel_wizard(network, path)
    with pytest.raises(
        ValueError, match=r"w\.safetensors lacks 116 of the 145 tensors of KernelWizard: feature_extractor\.7\.conv1\.weight; "
    ):
        load_kernel_wizard(path)
    with pytest.raises(ValueError, match=r"w\.safetensors.* feature_extractor\.0\.weight is 4x3x3x3 and must be 6x3x3x3; .*more$"):
        load_kernel_wizard(path, width=6, front=FRONT, back=BACK)


def test_weights_of_the_kernel_extractor_alone_are_refused(tmp_path):
    save_file(kernel_extractor(WIDTH), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors lacks 145 of the 145"):
        load_kernel_wizard(tmp_path / "w.safetensors")


def test_conversion_keeps_what_is_needed(network, tmp_path):
    source, target = tmp_path / "w.pth", tmp_path / "w.safetensors"
    torch.save({**kernel_extractor(WIDTH), **network.state_dict()}, source)
    target.write_bytes(b"an older file")
    convert(source, target, **LAYOUT)
    found = load_file(target)
    assert shapes_of(found) == published_shapes(**LAYOUT)
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.pth", "w.safetensors"]
    assert NonlinearBlur(load_kernel_wizard(target, **LAYOUT)).sha256 == NonlinearBlur(load_kernel_wizard(source, **LAYOUT)).sha256


def test_a_conversion_that_fails_leaves_the_target_alone(network, tmp_path, monkeypatch):
    target = tmp_path / "w.safetensors"
    target.write_bytes(b"an older file")
    torch.save(kernel_extractor(WIDTH), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth"):
        convert(tmp_path / "bad.pth", target, **LAYOUT)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_kernel_wizard(network, target)
    assert target.read_bytes() == b"an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth", "w.safetensors"]
    with pytest.raises(ValueError, match=r"w\.pth.*\.safetensors"):
        save_kernel_wizard(network, tmp_path / "w.pth")


@pytest.mark.parametrize("way", ["called", pytest.param("in a process", marks=pytest.mark.thorough)])
def test_command(full, full_file, tmp_path, capsys, way):
    source, target = tmp_path / "GOPRO_wVAE.pth", tmp_path / "GOPRO_wVAE.safetensors"
    torch.save({**kernel_extractor(64), **full.state_dict()}, source)
    if way == "called":
        nonlinear_blur.main([str(source), str(target)])
        printed = capsys.readouterr().out
    else:
        command = [sys.executable, "-m", "dmap_core.operators.nonlinear_blur"]
        root = Path(nonlinear_blur.__file__).parents[2]
        printed = subprocess.run([*command, source, target], cwd=root, capture_output=True, text=True, check=True).stdout
    assert str(target) in printed
    assert target.read_bytes() == full_file.read_bytes()


def test_command_refuses_in_one_line(tmp_path, capsys):
    source, target = tmp_path / "GOPRO_wVAE.pth", tmp_path / "GOPRO_wVAE.safetensors"
    source.write_bytes(b"<html>")
    with pytest.raises(SystemExit) as stopped:
        nonlinear_blur.main([str(source), str(target)])
    assert stopped.value.code == 1 and not target.exists()
    said = capsys.readouterr()
    assert "GOPRO_wVAE.pth is not a readable" in said.err and said.err.count("\n") == 1 and not said.out


def test_spec_round_trip(full, full_file):
    f = NonlinearBlur(full, seed=2**63 + 1, weights="full.safetensors")
    spec = json.loads(json.dumps(f.spec(), allow_nan=False))
    assert spec.pop("operator") == "NonlinearBlur"
    assert spec.keys() == {"seed", "weights", "sha256"}
    asked = []

    def find(name):
        asked.append(name)
        return full_file

    again = NonlinearBlur.from_settings(spec, find)
    assert asked == ["full.safetensors"]
    assert again.spec() == f.spec() and again.describe() == f.describe()
    assert shapes_of(again.network.state_dict()) == shapes_of(full.state_dict())
    assert all(torch.equal(tensor, again.network.state_dict()[name]) for name, tensor in full.state_dict().items())
    assert torch.equal(again.kernel((128, 256)), f.kernel((128, 256)))
    with pytest.raises(ValueError, match=rf"full\.safetensors holds other weights.*{f.sha256}.*wanted {'0' * 64}"):
        NonlinearBlur.from_settings({**spec, "sha256": "0" * 64}, find)


def test_specs_that_cannot_be_followed(network):
    spec = NonlinearBlur(network, 1, "w.pth").spec()
    del spec["operator"]
    with pytest.raises(ValueError, match=r"weights file w\.pth is needed"):
        NonlinearBlur.from_settings(spec)
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="names no weights file"):
            NonlinearBlur.from_settings({**spec, "weights": name}, Path)
    with pytest.raises(KeyError):
        NonlinearBlur.from_settings({"seed": 1, "weights": "w.pth"}, Path)


def test_sha256_is_of_names_and_numbers(network):
    before = NonlinearBlur(network).sha256
    assert len(before) == 64 and before == NonlinearBlur(network, 3, "other name").sha256
    assert NonlinearBlur(random_kernel_wizard(0, **LAYOUT).double()).sha256 == before
    changed = random_kernel_wizard(0, **LAYOUT)
    changed.recon_trunk[-1].bias[1] += 1e-6
    assert NonlinearBlur(changed).sha256 != before
