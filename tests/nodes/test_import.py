"""What ComfyUI waits for when it starts: the import of the pack looks through no folder, and its schemas only through those of models and pictures."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

NAME = "dmap_fresh"


@pytest.fixture
def listed(monkeypatch):
    """Folders that are looked through. The import system has functions of its own, which are not counted."""
    found = []

    def note(owner, name):
        original = getattr(owner, name)

        def noted(folder=".", *args, **kwargs):
            found.append(Path(folder))
            return original(folder, *args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    for owner, names in ((os, ("scandir", "listdir", "walk")), (Path, ("glob", "rglob", "iterdir"))):
        for name in names:
            note(owner, name)
    return found


def test_import_looks_through_no_folder(lab, listed):
    spec = importlib.util.spec_from_file_location(NAME, lab.ROOT / "__init__.py", submodule_search_locations=[str(lab.ROOT)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = pack
    try:
        spec.loader.exec_module(pack)
        loaded = [name for name in sys.modules if name.partition(".")[0] == NAME]
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]
    assert len(loaded) > 90  # it was imported anew
    assert listed == []


def test_schemas_look_through_folders_of_models_and_pictures_alone(lab, listed):
    import folder_paths

    for cls in lab.NODES.values():
        cls.define_schema()
    roots = [Path(folder) for folders, _ in folder_paths.folder_names_and_paths.values() for folder in folders]
    roots.append(Path(folder_paths.get_input_directory()))
    others = [folder for folder in listed if not any(folder == root or root in folder.parents for root in roots)]
    assert others == []
