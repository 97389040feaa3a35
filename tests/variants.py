"""Cases of a parametrised test of which `make test` takes some, .ci/run more and `make test-nightly` all."""

from collections.abc import Iterable

import pytest


def some_at_once(cases: Iterable, at_once: Iterable, nightly: Iterable = ()) -> list:
    """The cases, those of `nightly` marked so, and those that are not among `at_once` either marked thorough."""
    chosen, dear = list(at_once), list(nightly)

    def marked(case):
        if case in dear:
            return pytest.param(case, marks=pytest.mark.nightly)
        return case if case in chosen else pytest.param(case, marks=pytest.mark.thorough)

    return [marked(case) for case in cases]
