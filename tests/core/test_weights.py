"""Weights files: what is read, what is refused, and what a network gets."""

import argparse
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dmap_core.weights import fingerprint, load_into, read_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0])}


def same(found, wanted=TENSORS):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Bomb:
    """Unpickling it creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".tar", ".bin", ".PTH"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoints(tmp_path, suffix, zipped):
    path = tmp_path / f"w{suffix}"
    torch.save(OrderedDict(TENSORS), path, _use_new_zipfile_serialization=zipped)
    assert same(read_tensors(path))


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert same(read_tensors(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("wrapper", ["state_dict", "params", "model"])
def test_weights_one_level_down(tmp_path, wrapper):
    torch.save({"epoch": 3, wrapper: {**TENSORS, "version": 2}, "rate": torch.tensor(0.1)}, tmp_path / "w.pth")
    assert same(read_tensors(tmp_path / "w.pth"))


def test_a_parameter_called_like_a_wrapper_is_a_parameter(tmp_path):
    tensors = {"model": torch.ones(2), "b": torch.zeros(1)}
    torch.save(tensors, tmp_path / "w.pth")
    assert same(read_tensors(tmp_path / "w.pth"), tensors)


def test_things_that_are_not_tensors_are_left_out(tmp_path):
    torch.save({**TENSORS, "epoch": 3, 7: torch.ones(1), "names": ["x"]}, tmp_path / "w.pth")
    assert same(read_tensors(tmp_path / "w.pth"))


def test_parameters_come_without_a_graph(tmp_path):
    torch.save({"a": nn.Parameter(torch.ones(2))}, tmp_path / "w.pth")
    assert not read_tensors(tmp_path / "w.pth")["a"].requires_grad


def test_module_prefix_goes_only_if_all_names_have_it(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({f"module.{name}": tensor for name, tensor in TENSORS.items()}, path)
    assert same(read_tensors(path))
    some = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(some, path)
    assert same(read_tensors(path), some)
    torch.save({"module.module.a": torch.ones(1)}, path)
    assert same(read_tensors(path), {"module.a": torch.ones(1)})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", [lambda bomb: bomb, lambda bomb: {**TENSORS, "x": bomb}, lambda bomb: {"state_dict": {"x": [bomb]}}])
def test_code_in_a_checkpoint_does_not_run(tmp_path, place, zipped):
    path, crater = tmp_path / "evil.pth", tmp_path / "crater"
    torch.save(place(Bomb(crater)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="evil.pth"):
        read_tensors(path)
    assert not crater.exists()
    torch.load(path, weights_only=False)
    assert crater.exists()  # the bomb was a live one


def test_code_in_a_plain_pickle_does_not_run(tmp_path):
    path, crater = tmp_path / "evil.pth", tmp_path / "crater"
    path.write_bytes(pickle.dumps(Bomb(crater), protocol=2))
    with pytest.raises(ValueError, match="evil.pth"):
        read_tensors(path)
    assert not crater.exists()
    pickle.loads(path.read_bytes())
    assert crater.exists()


def test_a_checkpoint_with_objects_is_refused_with_advice_that_is_safe(tmp_path):
    torch.save({**TENSORS, "arguments": argparse.Namespace(rate=0.1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth holds more than tensors \(argparse\.Namespace\).*safetensors") as caught:
        read_tensors(tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value) and "add_safe_globals" not in str(caught.value)


def damaged(path, kind):
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.95])
def test_truncated_files(tmp_path, kind, kept):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    content = damaged(path, kind)
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"w\.\w+ is not a readable .*download"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"<!DOCTYPE html><title>Quota exceeded</title>", b"\x80\x02}q\x00.", bytes(1000), b"hello"])
def test_files_that_are_no_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("content", [{}, [torch.ones(2)], torch.ones(2), {"epoch": 3}, {"state_dict": {}}])
def test_checkpoints_without_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth holds no weights"):
        read_tensors(tmp_path / "w.pth")


def test_absent_files_folders_and_other_suffixes(tmp_path):
    with pytest.raises(ValueError, match=r"no weights file .*nowhere\.pth"):
        read_tensors(tmp_path / "nowhere.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match=r"no weights file .*folder\.pth"):
        read_tensors(tmp_path / "folder.pth")
    torch.save(TENSORS, tmp_path / "w.zip")
    with pytest.raises(ValueError, match=r"w\.zip is not a weights file.*\.safetensors.*\.pth"):
        read_tensors(tmp_path / "w.zip")


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1, bias=False))


def weights(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(5)
        for name, value in network().state_dict().items()
    }


def test_a_network_gets_copies_and_is_frozen():
    net, tensors = network().train(), weights()
    load_into(net, {**tensors, "decoder.weight": torch.ones(3)}, Path("w.pth"))
    assert same(net.state_dict(), tensors)
    assert not net.training and not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    tensors["0.weight"].zero_()
    assert net[0].weight.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_take_the_dtype_of_the_network(dtype):
    net, tensors = network(), {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights().items()}
    load_into(net, tensors, Path("w.pth"))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert same(net.state_dict(), {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})


def test_old_checkpoints_do_not_count_batches():
    tensors = weights()
    del tensors["1.num_batches_tracked"]
    net = network()
    load_into(net, tensors, Path("w.pth"))
    assert torch.equal(net[1].running_var, tensors["1.running_var"])
    assert net[1].num_batches_tracked == 0


def test_missing_weights_are_named():
    tensors = weights()
    del tensors["0.bias"], tensors["2.weight"]
    with pytest.raises(ValueError, match=r"some/w\.pth lacks 2 of the 8 tensors of Sequential: 0\.bias; 2\.weight$"):
        load_into(network(), tensors, Path("some/w.pth"))
    with pytest.raises(ValueError, match=r"lacks 7 of the 8 .*: 0\.weight; 0\.bias; 1\.weight; and 4 more$"):
        load_into(network(), TENSORS, Path("w.pth"))


def test_weights_of_another_shape_are_named_with_both_shapes():
    tensors = {**weights(), "0.weight": torch.zeros(2, 1, 5, 3), "1.bias": torch.zeros(()), "2.weight": torch.zeros(1, 2, 1, 1).byte()}
    with pytest.raises(ValueError, match="fit Sequential") as caught:
        load_into(network(), tensors, Path("w.pth"))
    assert "w.pth" in str(caught.value)
    assert "0.weight is 2x1x5x3 and must be 2x1x3x3" in str(caught.value)
    assert "1.bias is a single number and must be 2" in str(caught.value)
    assert "2.weight is 1x2x1x1 (uint8) and must be 1x2x1x1" in str(caught.value)


@pytest.mark.parametrize("change", [{"2.weight": torch.zeros(7)}, {"2.weight": None}])
def test_a_network_that_is_refused_weights_keeps_its_own(change):
    net, before = network(), network().state_dict()
    tensors = {name: tensor for name, tensor in {**weights(), **change}.items() if tensor is not None}
    with pytest.raises(ValueError):
        load_into(net, tensors, Path("w.pth"))
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("meta", [True, False], ids=["meta", "cpu"])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_autograd_may_save_weights_loaded_under_inference_mode(tmp_path, meta, kind):
    path = tmp_path / f"w.{kind}"
    tensors = weights()
    (save_file if kind == "safetensors" else torch.save)(tensors, path)
    with torch.inference_mode():
        with torch.device("meta" if meta else "cpu"):
            net = network()
        load_into(net, read_tensors(path), path)
    assert same(net.state_dict(), tensors)
    x = torch.rand(2, 1, 6, 6, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad.abs().max() > 0


def test_fingerprint_is_of_names_and_numbers():
    one = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    same = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    same.load_state_dict(one.state_dict())
    same[1].num_batches_tracked += 1
    assert len(fingerprint(one)) == 64 and fingerprint(one) == fingerprint(same) == fingerprint(same.double())
    with torch.no_grad():
        same[0].bias[1] += 1e-3
    assert fingerprint(one) != fingerprint(same)
    assert fingerprint(one) != fingerprint(nn.Sequential(one))


def test_a_lightning_checkpoint_of_2021_is_read_and_nothing_else_of_its_kind(tmp_path, monkeypatch):
    for module, readable in (("pytorch_lightning.callbacks.model_checkpoint", True), ("pytorch_lightning.callbacks.other", False)):
        cls = type("ModelCheckpoint", (), {"__module__": module})
        path = tmp_path / f"{module}.ckpt"
        with monkeypatch.context() as patch:
            for depth in range(1, len(module.split(".")) + 1):
                name = ".".join(module.split(".")[:depth])
                patch.setitem(sys.modules, name, types.ModuleType(name))
            sys.modules[module].ModelCheckpoint = cls
            torch.save({"callbacks": {cls: {"best": 1.0}}, "state_dict": {"model.w": torch.ones(2)}}, path)
        assert "pytorch_lightning" not in sys.modules
        if readable:
            assert torch.equal(read_tensors(path)["model.w"], torch.ones(2))
        else:
            with pytest.raises(ValueError, match="more than tensors"):
                read_tensors(path)
