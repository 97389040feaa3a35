"""Dynamic VRAM as a ComfyUI with an NVIDIA card has it by default, on a machine without one.

The patchers are ComfyUI's own ModelPatcherDynamic, which it takes for CUDA devices alone, and the files are opened as they are for it: weights
stay in the file's precision. What is left out is the library that keeps them in the GPU's memory. ComfyUI before 0.16 has nothing of it: there
the context changes nothing.
"""

import contextlib
import importlib

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import safetensors
import safetensors.torch

AVAILABLE = hasattr(comfy.model_patcher, "ModelPatcherDynamic")


class NoBuffer:
    """Stands for the pinned memory through which weights go to a GPU."""

    size = 0

    def __init__(self, *_, **__):
        pass

    def truncate(self, *_, **__):
        pass


def _patcher_class():
    class Dynamic(comfy.model_patcher.ModelPatcherDynamic):
        def __new__(cls, *_, **__):
            return object.__new__(cls)

        def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
            """As ComfyUI's own, which refuses a CPU: weights that were loaded ahead are the file's again."""
            for key in list(self.backup):
                comfy.utils.set_attr_param(self.model, key, self.backup.pop(key).weight)
            for key in list(self.backup_buffers):
                comfy.utils.set_attr_buffer(self.model, key, self.backup_buffers.pop(key))
            freed, self.model.model_loaded_weight_memory = self.model.model_loaded_weight_memory, 0
            return freed

    return Dynamic


def _load_as_stored(ckpt, *_, **__):
    with safetensors.safe_open(ckpt, framework="pt") as file:
        metadata = file.metadata()
    return safetensors.torch.load_file(ckpt), metadata


@contextlib.contextmanager
def dynamic_vram(gpu_precision=False):
    """What is loaded in the context is managed by dynamic VRAM. gpu_precision: ComfyUI chooses half precision, as it does on a GPU."""
    changes = []

    def change(owner, name, value):
        changes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        if gpu_precision:
            for name in ("should_use_fp16", "should_use_bf16"):
                change(comfy.model_management, name, lambda *_, **__: True)
        if AVAILABLE:
            change(importlib.import_module("comfy_aimdo.host_buffer"), "HostBuffer", NoBuffer)
            change(comfy.model_patcher, "CoreModelPatcher", _patcher_class())
            change(importlib.import_module("comfy.memory_management"), "aimdo_enabled", True)
            if hasattr(comfy.utils, "load_safetensors"):
                change(comfy.utils, "load_safetensors", _load_as_stored)
        yield
    finally:
        for owner, name, value in reversed(changes):
            setattr(owner, name, value)
        for entry in list(comfy.model_management.current_loaded_models):
            if entry.model is not None and getattr(entry.model, "is_dynamic", bool)():
                comfy.model_management.current_loaded_models.remove(entry)
