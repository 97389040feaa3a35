"""The tests of this folder run with ComfyUI's modules in their process, on the CPU, and in inference mode as ComfyUI runs a prompt.

The test modules are imported without ComfyUI: whatever needs it, they get from the fixture `lab` or import in their functions.
"""

import sys
from pathlib import Path

import pytest
from host import comfyui_python, import_comfy

FOLDER = Path(__file__).resolve().parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if FOLDER not in item.path.parents:  # pytest asks for the tests of other folders, too
        return (yield)
    import torch

    with torch.inference_mode():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def comfyui(comfyui_tree, tmp_path_factory):
    """ComfyUI's modules can be imported."""
    if comfyui_python() != sys.executable:
        pytest.fail(f"These tests have to run in {comfyui_python()}: python tests/run.py does that.", pytrace=False)
    sys.dont_write_bytecode = True  # ComfyUI's tree is only read
    import_comfy()
    import folder_paths

    folder_paths.set_input_directory(str(tmp_path_factory.mktemp("input")))  # where the pack puts its samples
    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))  # and what a cancelled run leaves
    sys.path.append(str(FOLDER))  # for lab and its like, behind ComfyUI's modules
    from comfy.cli_args import args

    args.cpu = True


@pytest.fixture(scope="session")
def lab(comfyui):
    """The module lab: ComfyUI, the pack, and a small problem to solve with them."""
    import lab

    return lab


@pytest.fixture(scope="session")
def cses(lab):
    """The module cses: CSEs for that problem, and trainings of them."""
    import cses

    return cses
