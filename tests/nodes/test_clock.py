"""How long a run still takes: from its own steps, without the first, and where it is said."""

import importlib
import logging

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def clock(lab, monkeypatch):
    """The module, with a time that tests set."""
    module = importlib.import_module("dmap_pack.nodes.host.clock")
    module_time = {"now": 0.0}
    monkeypatch.setattr(module.time, "perf_counter", lambda: module_time["now"])
    module_time["module"] = module
    return module_time


def test_the_first_step_does_not_count(clock):
    c = clock["module"].Clock(11)
    assert c.seconds_per_step() is None and c.left() is None
    clock["now"] = 100.0
    c.step()
    assert c.left() is None
    for now in (103.0, 107.0):
        clock["now"] = now
        c.step()
    assert c.seconds_per_step() == 3.5 and c.left() == 8 * 3.5


def test_words(clock):
    words = clock["module"].in_words
    assert [words(s) for s in (0.4, 45, 89, 90, 720, 12_000)] == ["0 s", "45 s", "89 s", "2 min", "12 min", "3 h 20 min"]


def test_it_is_said_once_in_the_console_and_at_every_step_on_the_node(clock, monkeypatch, caplog):
    module, said = clock["module"], []
    monkeypatch.setattr(module, "say", said.append)
    c = module.Clock(4)
    with caplog.at_level(logging.INFO):
        for now in (10.0, 130.0, 250.0, 370.0):
            clock["now"] = now
            c.step()
    assert said == ["step 1 of 4", "step 2 of 4, about 4 min left", "step 3 of 4, about 2 min left", "step 4 of 4, about 0 s left"]
    assert [r.getMessage() for r in caplog.records] == ["DPSGuider: 4 steps of 120.0 s, about 4 min left"]


@pytest.mark.parametrize("sampler", ["DMAP", "ddpm"])
def test_every_step_of_a_run_is_timed(lab, sampler, monkeypatch):
    module, said = importlib.import_module("dmap_pack.nodes.host.clock"), []
    monkeypatch.setattr(module, "say", said.append)
    guider = lab.guider()
    lab.sample(guider, lab.dmap() if sampler == "DMAP" else lab.stock(sampler), steps=3)
    assert [text.split(",")[0] for text in said] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    levels = [float(text.partition("mismatch ")[2].split(" ")[0]) for text in said]
    assert levels == [pytest.approx(max(step), abs=0.051) for step in guider.report.levels]
    assert guider.report.seconds_per_step > 0 and " s a step), memory plan" in guider.report.text()


def test_without_a_server_nothing_is_said(lab):
    importlib.import_module("dmap_pack.nodes.host.clock").say("unheard")
