"""Cases of a parametrised test of which `make test` takes some and .ci/run all."""

from collections.abc import Iterable

import pytest


def some_at_once(cases: Iterable, at_once: Iterable) -> list:
    """The cases, those that are not among `at_once` marked thorough."""
    chosen = list(at_once)
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.thorough) for case in cases]
