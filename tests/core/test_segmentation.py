"""Segmentation of room layouts: the published network, labels as pictures and masks, and its files."""

import json
from collections import OrderedDict

import pytest
import torch
from host import import_torchvision
from safetensors.torch import save_file
from torch.nn import functional as F

from dmap_core.operators.segmentation import CLASSES, PALETTE, RoomLayout, Segmentation, load_room_layout, random_room_layout

TINY = {"layers": (1, 1, 2, 1), "width": 4, "bottleneck": 3}
SIZE = (64, 128)


@pytest.fixture(scope="module")
def tiny():
    return Segmentation(random_room_layout(3, **TINY))


@pytest.fixture
def weights(tiny, tmp_path):
    """A file as the public training code writes it, beside other things."""
    path = tmp_path / "room.ckpt"
    state = OrderedDict((f"model.{name}", value) for name, value in tiny.network.state_dict().items())
    torch.save({"epoch": 3, "state_dict": state, "hyper_parameters": {"backbone": "resnet101"}}, path)
    return path


def picture(batch=1, size=SIZE, seed=0, dtype=torch.float32):
    coarse = torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return F.interpolate(coarse, size=size, mode="bilinear").clamp(-1, 1)


def random_labels(batch=1, size=SIZE, seed=0):
    return torch.randint(0, 5, (batch, 1, *size), generator=torch.Generator().manual_seed(seed)).float()


def norm(name, channels):
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")} | {
        f"{name}.num_batches_tracked": ()
    }


def published_shapes():
    """ResNet-101's 3 + 4 + 23 + 3 bottlenecks and the planar head, name by name."""
    shapes = {"resnet.conv1.weight": (64, 3, 7, 7), **norm("resnet.bn1", 64)}
    before = 64
    for stage, (blocks, c) in enumerate([(3, 64), (4, 128), (23, 256), (3, 512)], 1):
        for block in range(blocks):
            name = f"resnet.layer{stage}.{block}"
            shapes |= {f"{name}.conv1.weight": (c, before, 1, 1), **norm(f"{name}.bn1", c)}
            shapes |= {f"{name}.conv2.weight": (c, c, 3, 3), **norm(f"{name}.bn2", c)}
            shapes |= {f"{name}.conv3.weight": (4 * c, c, 1, 1), **norm(f"{name}.bn3", 4 * c)}
            if block == 0:
                shapes |= {f"{name}.downsample.0.weight": (4 * c, before, 1, 1), **norm(f"{name}.downsample.1", 4 * c)}
            before = 4 * c
    shapes |= {"resnet.fc.weight": (1000, 2048), "resnet.fc.bias": (1000,)}
    shapes |= {"planar_seg.fc_conv.weight": (2048, 2048, 1, 1), **norm("planar_seg.bn", 2048)}
    shapes |= {f"planar_seg.clf{i}.weight": (37, c, 1, 1) for i, c in ((1, 2048), (2, 2048), (3, 1024))}
    shapes |= {f"planar_seg.dec{i}.weight": (37, 37, side, side) for i, side in ((1, 4), (2, 4), (3, 32))}
    shapes |= {"planar_seg.fc_stage2.weight": (5, 37, 1, 1)}
    return shapes


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        network = RoomLayout()
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == published_shapes()
    assert len(network.state_dict()) == 626 + 13
    assert sum(p.numel() for p in network.resnet.parameters()) == 44_549_160  # what torchvision states for its ResNet-101


def reference(state, layers, image):
    """The published network, from torchvision's ResNet and what is known about the head."""
    import_torchvision()
    from torchvision.models.resnet import Bottleneck, ResNet

    trunk = ResNet(Bottleneck, layers).to(image.dtype).eval()
    trunk.load_state_dict({name.removeprefix("resnet."): v for name, v in state.items() if name.startswith("resnet.")})
    x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(image))))
    e5 = trunk.layer3(trunk.layer2(trunk.layer1(x)))
    e6 = trunk.layer4(e5)
    e7 = trunk.maxpool(e6)
    p = {name.removeprefix("planar_seg."): v for name, v in state.items() if name.startswith("planar_seg.")}
    x = F.conv2d(e7, p["fc_conv.weight"])
    x = F.batch_norm(x, p["bn.running_mean"], p["bn.running_var"], p["bn.weight"], p["bn.bias"])
    x = F.conv2d(x.relu(), p["clf1.weight"])
    x = F.conv_transpose2d(x, p["dec1.weight"], stride=2, padding=1) + F.conv2d(e6, p["clf2.weight"])
    x = F.conv_transpose2d(x, p["dec2.weight"], stride=2, padding=1) + F.conv2d(e5, p["clf3.weight"])
    x = F.conv_transpose2d(x, p["dec3.weight"], stride=16, padding=8)
    return (e5, e6, e7), F.conv2d(x, p["fc_stage2.weight"])


@torch.no_grad()
def test_the_network_is_torchvisions_resnet_and_the_published_head():
    layers = (1, 2, 2, 2)
    network = random_room_layout(1, layers).double()
    x = picture(dtype=torch.float64)
    maps, scores = reference(network.state_dict(), layers, x)
    for own, theirs in zip(network.resnet(x), maps, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network(x), scores, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_full_network_runs_and_its_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(7)
    network = random_room_layout(5)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(7)))  # the global generator is untouched
    f = Segmentation(network)
    scores = f(picture(size=(64, 64)))
    assert scores.shape == (1, 5, 64, 64)
    assert 0.1 < float(scores.std()) < 20
    assert len(f.measure(picture(size=(64, 64))).unique()) > 1


def test_random_weights_are_seeded():
    one, again, other = (random_room_layout(seed, **TINY).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["resnet.conv1.weight"], other["resnet.conv1.weight"])


def test_random_labels_vary_over_the_picture_and_with_it(tiny):
    a, b = tiny.measure(picture(2))
    assert len(a.unique()) > 2
    assert float((a != b).float().mean()) > 0.05


@torch.no_grad()
def test_a_batch_is_its_pictures_one_by_one(tiny):
    x = picture(3)
    torch.testing.assert_close(tiny(x), torch.cat([tiny(sample[None]) for sample in x]), rtol=1e-5, atol=1e-6)
    assert torch.equal(tiny(x), tiny(x))


def test_measurements_are_the_best_class_of_every_pixel(tiny):
    x = picture(2).requires_grad_()
    y = tiny.measure(x)
    assert y.shape == (2, 1, *SIZE) and y.dtype == torch.float32 and not y.requires_grad
    scores = tiny(x).detach()
    assert torch.equal(scores.gather(1, y.long())[:, 0], scores.amax(dim=1))
    assert not tiny.linear and tiny.channels() == 1 and tiny.measurement_size(SIZE) == SIZE and tiny.image_size(y) == SIZE


def test_gradient_is_that_of_finite_differences():
    f = Segmentation(random_room_layout(4, **TINY).double())
    generator = torch.Generator().manual_seed(2)
    # flat areas would put the largest of equal values into the max pooling, whose derivative depends on the direction
    x = (picture(dtype=torch.float64) + 0.1 * torch.randn(1, 3, *SIZE, generator=generator, dtype=torch.float64)).requires_grad_()
    y = random_labels()

    def loss(image):
        return F.cross_entropy(f(image), y[:, 0].long())

    (gradient,) = torch.autograd.grad(loss(x), x)
    for _ in range(3):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            slope = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4)
    # the distance is float32, its gradient that of the same loss
    (through_distance,) = torch.autograd.grad(f.distance(f(x), y).sum(), x)
    torch.testing.assert_close(through_distance, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_distance_is_the_cross_entropy_of_every_sample(tiny):
    scores = 3 * torch.randn(3, 5, 8, 9, generator=torch.Generator().manual_seed(1))
    y = random_labels(3, (8, 9))
    each = torch.stack([F.cross_entropy(s[None], labels.long()) for s, labels in zip(scores, y, strict=True)])
    torch.testing.assert_close(tiny.distance(scores, y), each)
    assert tiny.distance(torch.zeros(1, 5, 8, 9), y[:1]).item() == pytest.approx(1.609437912)  # ln 5
    assert tiny.distance(scores, y[:1]).shape == (3,)


def test_distance_of_half_scores_is_float32(tiny):
    scores = torch.full((1, 5, 64, 64), 30.0, dtype=torch.float16)
    scores[:, 1] = 37.0
    distance = tiny.distance(scores, torch.ones(1, 1, 64, 64, dtype=torch.float16))
    assert distance.dtype == torch.float32
    assert distance.item() == pytest.approx(0.0036408, rel=1e-3)  # ln(1 + 4 exp(-7))


def test_images_of_half_precision_are_segmented(tiny):
    x = picture().half()
    assert torch.equal(tiny(x), tiny(x.float()))


@pytest.mark.parametrize("value", [0.5, 5.0, -1.0, float("nan"), float("inf")])
def test_labels_that_are_no_class_are_refused(tiny, value):
    y = random_labels(1, (8, 8))
    y[0, 0, 3, 4] = value
    with pytest.raises(ValueError, match="0 to 4"):
        tiny.distance(torch.zeros(1, 5, 8, 8), y)
    with pytest.raises(ValueError, match="0 to 4"):
        tiny.picture(y)


def test_labels_of_another_shape_are_refused(tiny):
    with pytest.raises(ValueError, match="do not fit"):
        tiny.distance(torch.zeros(1, 5, 8, 8), random_labels(1, (8, 9)))
    with pytest.raises(ValueError, match="do not fit"):
        tiny.distance(torch.zeros(3, 5, 8, 8), random_labels(2, (8, 8)))
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        tiny.distance(torch.zeros(1, 5, 8, 8), torch.zeros(1, 3, 8, 8))


def test_there_is_no_noise_level(tiny):
    with pytest.raises(ValueError, match="cross-entropy.*noise"):
        tiny.elements(random_labels())


@pytest.mark.parametrize("size, near", [((63, 64), "64x64"), ((32, 32), "64x64"), ((320, 300), "320x320"), ((96, 512), "512x128")])
def test_sizes_that_do_not_fit_the_network(tiny, size, near):
    for ask in (tiny.check, tiny.measurement_size, lambda s: tiny(torch.zeros(1, 3, *s)), lambda s: tiny.image_size(torch.zeros(1, 1, *s))):
        with pytest.raises(ValueError, match=f"picture is {size[1]}x{size[0]}.*multiples of 64.* {near}"):
            ask(size)


def test_grey_pictures_are_refused(tiny):
    with pytest.raises(ValueError, match="1 channel"):
        tiny(torch.zeros(1, 1, 64, 64))


def test_classes_have_the_published_colours(tiny):
    shown = tiny.picture(torch.arange(5.0).view(1, 1, 1, 5))
    assert shown.shape == (1, 3, 1, 5) and float(shown.abs().max()) <= 1
    rgb = ((shown + 1) * 127.5).round().int()[0, :, 0].T
    assert [bytes(colour).hex() for colour in rgb.tolist()] == ["f9455d", "ffe5aa", "90ceb5", "515177", "f1f7d2"]
    assert CLASSES == ("frontal", "left", "right", "floor", "ceiling")


@pytest.mark.parametrize("to_bytes", [torch.round, torch.floor], ids=["rounded", "cut off"])
def test_labels_survive_an_8_bit_picture(tiny, to_bytes):
    y = tiny.measure(picture(2))
    shown = tiny.picture(y)
    assert torch.equal(tiny.hint(y), shown)
    stored = to_bytes((shown + 1) / 2 * 255).to(torch.uint8)
    assert torch.equal(tiny.read(stored.float() / 255 * 2 - 1), y)
    assert torch.equal(tiny.read(shown.double()), y)


def test_colours_of_no_class_are_named(tiny):
    y = random_labels(2, (8, 8))
    shown = tiny.picture(y)
    shown[1, :, 2, 3] = torch.tensor([10.0, 20.0, 30.0]) / 127.5 - 1
    shown[1, :, 5, 0] = 0
    with pytest.raises(ValueError) as error:
        tiny.read(shown)
    for part in ("2 of 128 pixels", "RGB (10, 20, 30)", "floor (81, 81, 119)", "nearest-exact", "PNG"):
        assert part in str(error.value)


@pytest.mark.parametrize("off, known", [(2, True), (3, False)])
def test_colours_may_be_off_by_two(tiny, off, known):
    frontal = torch.tensor(PALETTE[0]).float().view(1, 3, 1, 1)
    shown = (frontal + torch.tensor([0.0, -off, 0.0]).view(1, 3, 1, 1)) / 127.5 - 1
    if known:
        assert tiny.read(shown).item() == 0
    else:
        with pytest.raises(ValueError, match="1 of 1 pixels"):
            tiny.read(shown)


def test_interpolated_label_pictures_are_refused(tiny):
    shown = tiny.picture(tiny.measure(picture()))
    with pytest.raises(ValueError, match="in-between colours"):
        tiny.read(F.interpolate(shown, scale_factor=0.7, mode="bilinear"))
    assert tiny.read(F.interpolate(shown, scale_factor=2, mode="nearest-exact")).shape == (1, 1, 128, 256)


def test_pictures_without_colours_are_refused(tiny):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        tiny.read(random_labels())
    with pytest.raises(ValueError, match="NaN"):
        tiny.read(torch.full((1, 3, 2, 2), float("nan")))


def test_masks_make_labels():
    y = random_labels(2, (6, 7))
    masks = F.one_hot(y[:, 0].long(), 5).permute(0, 3, 1, 2).flatten(0, 1).float()
    assert torch.equal(Segmentation(None).read_masks(masks), y)
    assert torch.equal(Segmentation(None).read_masks(masks[:5]), y[:1])
    assert torch.equal(Segmentation(None).read_masks(0.1 + 0.4 * masks), y)  # 0.5 and above


def test_masks_that_overlap_or_leave_holes_are_refused():
    masks = torch.zeros(5, 4, 4)
    masks[0] = 1
    masks[3, 0] = 1
    masks[0, 3, 1:] = 0.49
    with pytest.raises(ValueError, match="3 pixels are in none and 4 in several"):
        Segmentation(None).read_masks(masks)


@pytest.mark.parametrize("shape", [(4, 8, 8), (6, 8, 8), (0, 8, 8), (8, 8), (1, 5, 8, 8)])
def test_masks_come_in_fives(shape):
    with pytest.raises(ValueError, match="frontal, left, right, floor, ceiling"):
        Segmentation(None).read_masks(torch.ones(shape))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_networks_are_loaded_with_or_without_prefix(tiny, tmp_path, prefix):
    path = tmp_path / "room.safetensors"
    save_file({prefix + name: value for name, value in tiny.network.state_dict().items()}, path)
    network = load_room_layout(path)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        assert torch.equal(network(picture()), tiny.network(picture()))


def test_missing_weights_are_named(tiny, tmp_path):
    path = tmp_path / "room.safetensors"
    state = tiny.network.state_dict()
    del state["resnet.layer3.0.bn2.running_var"]
    save_file(dict(state), path)
    with pytest.raises(ValueError, match=r"room.safetensors.*resnet\.layer3\.0\.bn2\.running_var"):
        load_room_layout(path)


@pytest.mark.parametrize(
    "key, named",
    [
        ("planar_seg.fc_stage2.weight", "planar_seg.fc_stage2.weight"),
        ("resnet.layer2.0.conv2.weight", "resnet.layer2.0.conv2.weight"),
        # the width is read off these, so that what does not fit is the rest
        ("resnet.conv1.weight", "resnet.bn1.weight"),
        ("planar_seg.clf1.weight", "planar_seg.clf2.weight"),
    ],
)
def test_weights_of_another_shape_are_named(tiny, tmp_path, key, named):
    path = tmp_path / "room.safetensors"
    state = tiny.network.state_dict()
    state[key] = torch.zeros([2, *state[key].shape[1:]])
    save_file(dict(state), path)
    with pytest.raises(ValueError, match=f"room.safetensors.*{named}"):
        load_room_layout(path)


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"unet.conv.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match="resnet.conv1.weight"):
        load_room_layout(path)
    save_file({"resnet.conv1.weight": torch.zeros(5000, 1, 1, 1), "planar_seg.clf1.weight": torch.zeros(0, 1, 1, 1)}, path)
    with pytest.raises(ValueError, match="other.safetensors"):
        load_room_layout(path)


def test_networks_made_under_inference_mode_can_be_differentiated(weights):
    with torch.inference_mode():
        loaded = Segmentation(load_room_layout(weights), weights.name).to("cpu")
        made = Segmentation(random_room_layout(0, **TINY)).to("cpu")
        y = loaded.measure(picture())
    for f in (loaded, made):
        assert not any(value.is_inference() for value in f.network.state_dict().values())
        x = picture().requires_grad_()
        (gradient,) = torch.autograd.grad(f.distance(f(x), y).sum(), x)
        assert float(gradient.abs().max()) > 0


def test_spec_names_the_file_and_finds_it_again(weights):
    f = Segmentation(load_room_layout(weights), "rooms/room.ckpt")
    spec = json.loads(json.dumps(f.spec(), allow_nan=False))
    assert spec.pop("operator") == "Segmentation"
    assert set(spec) == {"weights", "sha256"}
    asked = []
    again = Segmentation.from_settings(spec, lambda name: asked.append(name) or weights)
    assert (
        asked == ["rooms/room.ckpt"] and again.spec() == f.spec() and f.describe() == again.describe() == "Segmentation (rooms/room.ckpt)"
    )
    with torch.no_grad():
        assert torch.equal(again(picture()), f(picture()))


def test_spec_of_a_changed_or_absent_file(weights, tiny):
    settings = {"weights": weights.name, "sha256": "0" * 64}
    with pytest.raises(ValueError, match="room.ckpt.*not the file"):
        Segmentation.from_settings(settings, lambda name: weights)
    with pytest.raises(ValueError, match="room.ckpt.*needed"):
        Segmentation.from_settings(settings, None)
    with pytest.raises(ValueError, match="names no weights file"):
        Segmentation.from_settings({"weights": tiny.weights, "sha256": tiny.sha256}, lambda name: weights)
