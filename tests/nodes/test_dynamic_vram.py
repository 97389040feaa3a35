"""Under dynamic VRAM, the default on NVIDIA cards, a guided run gives the picture that it gives without, bit by bit, and keeps nothing.

ComfyUI before 0.16 has no dynamic VRAM; these tests then compare a run with itself, in full precision only, and most of them only in .ci/run, which
has a newer ComfyUI as well.
"""

import contextlib
import gc

import pytest
import torch
from host import HostError, comfyui_path

KINDS, KNOWN = ["full precision", "as on a GPU", "as on a GPU, a file in full precision"], True
with contextlib.suppress(HostError):  # which the tests report
    KNOWN = (comfyui_path() / "comfy" / "memory_management.py").exists()
STEPS = 2  # half precision is slow on a CPU, and bits that differ do so from the first step on
with_itself = (lambda test: test) if KNOWN else pytest.mark.thorough  # where there is nothing to compare with


@pytest.fixture
def dynamic(lab):
    import dynamic

    return dynamic


@pytest.fixture
def cses(lab):
    import cses

    return cses


@pytest.fixture(params=KINDS if KNOWN else KINDS[:1])
def fresh(lab, dynamic, request, monkeypatch, tmp_path):
    """fresh(moving) -> (model, vae), as a loader node makes them with dynamic VRAM or without."""
    if "file" in request.param:
        from safetensors.torch import load_file, save_file

        weights = load_file(lab.folder_paths.get_full_path("checkpoints", lab.CHECKPOINT))
        save_file({name: weight.float() for name, weight in weights.items()}, tmp_path / "full.safetensors")
        monkeypatch.setitem(lab.folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
        monkeypatch.setattr(lab, "CHECKPOINT", "full.safetensors")
    gpu = "GPU" in request.param
    with contextlib.ExitStack() as stack:

        def load(moving):
            if moving:
                stack.enter_context(dynamic.dynamic_vram(gpu))
                return lab.fresh()
            with pytest.MonkeyPatch.context() as patch:
                for name in ("should_use_fp16", "should_use_bf16") if gpu else ():
                    patch.setattr(lab.comfy.model_management, name, lambda *_, **__: True)
                return lab.fresh()

        yield load


def restored(lab, model, vae, **changes):
    samplers = (lab.dps(), lab.dmap(), lab.stock("ddpm"))
    return [lab.sample(lab.guider(model=model, vae=vae, **changes), sampler, steps=STEPS) for sampler in samplers]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_fake_is_what_it_says(lab, dynamic, fresh):
    model, vae = fresh(True)
    for patcher in (model, vae.patcher):
        assert getattr(patcher, "is_dynamic", bool)() == dynamic.AVAILABLE


def without_jacobian(lab, model, vae):
    samplers = [lab.dmap(jacobian="none"), lab.dps(jacobian="none", inner=2), lab.stock("ddpm")]
    return [lab.sample(lab.guider(model=model, vae=vae, step="auto", jacobian="none"), sampler, steps=STEPS) for sampler in samplers]


def test_without_the_denoisers_jacobian_only_the_vae_is_copied(lab, fresh, monkeypatch):
    """The denoiser runs as in plain sampling, its weights moving as they like."""
    import importlib

    static = importlib.import_module("dmap_pack.nodes.host.static")
    copied, original = [], static._copied
    monkeypatch.setattr(static, "_copied", lambda patcher: copied.append(type(patcher.model).__name__) or original(patcher))
    model, vae = fresh(False)
    plain = without_jacobian(lab, model, vae)
    assert not copied
    model, vae = fresh(True)
    same(without_jacobian(lab, model, vae), plain)
    assert set(copied) == ({type(vae.patcher.model).__name__} if KNOWN else set())


@pytest.mark.parametrize("jacobian", ["exact", "none"])
def test_a_denoiser_that_is_in_part_elsewhere(lab, jacobian, monkeypatch):
    """What ComfyUI does where it does not fit: fine for plain sampling, and so without its Jacobian; for gradients through it refused."""
    model, vae = lab.shared()
    monkeypatch.setattr(model.model, "model_lowvram", True, raising=False)
    monkeypatch.setattr(lab.comfy.model_management, "load_models_gpu", lambda patchers, **how: [p.model for p in patchers])
    guider = lab.guider(model=model, vae=vae)
    if jacobian == "exact":
        with pytest.raises(RuntimeError, match="does not fit into the GPU's memory as a whole, which gradients need"):
            lab.sample(guider, lab.dps())
    else:
        assert torch.isfinite(lab.sample(guider, lab.dps(jacobian="none"))).all()


def test_pictures_are_the_same(lab, fresh):
    model, vae = fresh(False)
    plain, stock = restored(lab, model, vae), lab.ksampler(model)
    model, vae = fresh(True)
    same([lab.ksampler(model), *restored(lab, model, vae), lab.ksampler(model)], [stock, *plain, stock])


@with_itself
@pytest.mark.parametrize("memory", ["lean", "checkpoint", "auto"])
def test_memory_plans(lab, dynamic, memory):
    plain = restored(lab, *lab.fresh(), memory=memory)
    with dynamic.dynamic_vram():
        same(restored(lab, *lab.fresh(), memory=memory), plain)


@with_itself
def test_a_lora_and_a_vae_of_a_loader_that_cannot_reload_it(lab, dynamic):
    plain = restored(lab, lab.with_lora(lab.fresh()[0]), lab.separate_vae())
    with dynamic.dynamic_vram():
        model = lab.fresh()[0]
        unpatched = lab.ksampler(model)
        same(restored(lab, lab.with_lora(model), lab.separate_vae()), plain)
        same([lab.ksampler(model)], [unpatched])


@with_itself
def test_a_cse(lab, cses, dynamic, tmp_path):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8)
    y = lab.call("DMAP_Degrade", image=lab.picture(), operator=operator, noise_sigma=0.0, seed=0)

    def guided(model, vae):
        positive = cses.apply(cses.load("own.safetensors")[0], y, operator)
        positive = cses.apply(cses.load("own.safetensors")[0], y, operator, positive=positive)
        return restored(lab, model, vae, operator=operator, measurement=y, positive=positive)

    with cses.Folders(tmp_path) as folders:
        cses.save(cses.weights(lab.shared()[0]), folders.controlnet / "own.safetensors")
        plain = guided(*lab.fresh())
        assert any(bool((a != b).any()) for a, b in zip(plain, restored(lab, *lab.fresh(), operator=operator, measurement=y), strict=True))
        with dynamic.dynamic_vram():
            same(guided(*lab.fresh()), plain)


def tensors():
    """Bytes of all parameters that are alive."""
    gc.collect()
    return sum(p.nbytes for p in gc.get_objects() if isinstance(p, torch.nn.Parameter))


@with_itself
def test_copies_are_given_back(lab, dynamic):
    with dynamic.dynamic_vram():
        model, vae = lab.fresh()
        guider = lab.guider(model=model, vae=vae)
        lab.sample(guider, lab.dps())  # what is loaded once and stays is loaded now
        before, loaded = tensors(), len(lab.comfy.model_management.current_loaded_models)
        for _ in range(2):
            lab.sample(guider, lab.dmap())
            lab.sample(lab.guider(model=model, vae=vae), lab.dps())
        assert tensors() == before
        assert len(lab.comfy.model_management.current_loaded_models) == loaded


@with_itself
def test_copies_are_given_back_after_an_error(lab, dynamic):
    with dynamic.dynamic_vram():
        model, vae = lab.fresh()
        guider = lab.guider(model=model, vae=vae)
        lab.sample(guider, lab.dps())
        before = tensors()
        with pytest.raises(lab.core.errors.Diverged):
            lab.sample(guider, lab.dps(zeta=1e30))
        assert tensors() == before


def test_a_model_that_still_moves_is_refused(lab, dynamic):
    import importlib

    module = importlib.import_module("dmap_pack.nodes.host.static")
    with dynamic.dynamic_vram():
        model, _ = lab.fresh()
        if not dynamic.AVAILABLE:
            module.check_static([model])
            return
        with pytest.raises(RuntimeError, match="--disable-dynamic-vram"):
            module.check_static([model])
        with module.static_patchers() as static:
            module.check_static([static(model)])


def test_freezing_keeps_what_the_host_noted_on_a_weight(lab):
    import importlib

    layer = torch.nn.Linear(2, 2)  # under inference mode, as all weights are
    layer.weight._model_dtype = torch.float16
    assert layer.weight.is_inference()
    with torch.inference_mode(False), importlib.import_module("dmap_pack.nodes.host.gradients").frozen([layer]):
        assert not layer.weight.is_inference() and layer.weight._model_dtype == torch.float16
