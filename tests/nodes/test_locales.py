"""locales/: the English words are those of the schemas, and the Chinese ones are all there. tools/build_locales.py writes the first and names what is missing."""

import copy
import importlib.util
import json
import re

import pytest

CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def locales(lab):
    spec = importlib.util.spec_from_file_location("build_locales", lab.ROOT / "tools" / "build_locales.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def english(lab, locales):
    return locales.words({node_id: cls.GET_NODE_INFO_V1() for node_id, cls in lab.NODES.items()})


def test_english_is_what_the_schemas_say(lab, locales, english):
    assert locales.read("en") == english, "run: python tools/build_locales.py"
    assert english.keys() == lab.NODES.keys()
    assert not [text for text in locales.flat(english).values() if locales.SPECIAL.search(text)]


def test_every_text_has_a_translation(locales, english):
    assert locales.faults(english, locales.read("zh")) == []


def test_translations_are_chinese(locales):
    """All but names that stay what they are, such as VAE."""
    told = {
        path: text
        for path, text in locales.flat(locales.read("zh")).items()
        if path.endswith((".description", ".tooltip", ".display_name"))
    }
    assert [path for path, text in told.items() if not CHINESE.search(text)] == []


def test_words_of_an_input_by_hand(lab, english):
    scale = english["DMAP_OperatorSuperResolution"]["inputs"]["scale"]
    (of_schema,) = lab.NODES["DMAP_OperatorSuperResolution"].GET_SCHEMA().inputs
    assert scale == {"name": "scale", "tooltip": of_schema.tooltip}
    assert english["DMAP_DPSGuider"]["inputs"]["zeta"]["name"] == "zeta (stock samplers only)"
    assert english["DMAP_EmptyMeasurementLatent"]["outputs"]["1"] == {
        "name": "width",
        "tooltip": "Width of the restored picture in pixels.",
    }


def test_what_is_missing_unknown_or_not_shown_is_a_fault(locales, english):
    changed = copy.deepcopy(english)
    assert locales.faults(english, changed) == []
    del changed["DMAP_Decode"]["description"]
    changed["DMAP_Decode"]["inputs"]["vae"]["tooltip"] = " "
    changed["DMAP_Decode"]["outputs"]["7"] = {"name": "x"}
    changed["DMAP_Degrade"]["description"] = "||f(x)||"
    found = locales.faults(english, changed)
    assert [fault.partition(":")[0] for fault in found] == [
        "DMAP_Decode.description",
        "DMAP_Decode.inputs.vae.tooltip",
        "DMAP_Decode.outputs.7.name",
        "DMAP_Degrade.description",
    ]


def test_files_are_what_the_host_reads(lab):
    """ComfyUI takes main.json and nodeDefs.json of a language's folder, and says nothing about others."""
    files = [path for path in (lab.ROOT / "locales").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"main.json", "nodeDefs.json"}
    for path in files:
        assert json.loads(path.read_text(encoding="utf-8"))
