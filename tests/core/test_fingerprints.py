"""tools/fingerprints.py, with which a change of structure shows that no picture changed: it runs, and tells pictures apart."""

import functools
import importlib.util

import pytest
from host import ROOT


@pytest.fixture(scope="module")
def fingerprints():
    spec = importlib.util.spec_from_file_location("fingerprints", ROOT / "tools" / "fingerprints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_repeat_and_differ(fingerprints, monkeypatch, capsys):
    monkeypatch.setattr(fingerprints, "SIDE", 32)
    monkeypatch.setattr(fingerprints, "STEPS", 2)
    monkeypatch.setattr(fingerprints, "open_base", functools.cache(fingerprints.open_base))
    monkeypatch.setattr(fingerprints, "OPERATORS", (fingerprints.OPERATORS[0], fingerprints.OPERATORS[4]))  # a large blur needs more pixels
    monkeypatch.setattr(fingerprints, "SOLVERS", fingerprints.SOLVERS[:1])
    fingerprints.main()
    first = capsys.readouterr().out.splitlines()
    assert len(first) == 2 * 3  # operators times memory plans
    assert len({line.split()[-1] for line in first}) == 2  # of which the plans make the same picture
    fingerprints.main()
    assert capsys.readouterr().out.splitlines() == first
    monkeypatch.setattr(fingerprints, "SEED", 8)
    fingerprints.main()
    assert not {line.split()[-1] for line in capsys.readouterr().out.splitlines()} & {line.split()[-1] for line in first}
