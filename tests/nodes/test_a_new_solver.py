"""A solver's node is one entry: its inputs, its checks and its report follow from what the solver declares."""

import importlib
from dataclasses import dataclass

import pytest
import torch


@pytest.fixture(scope="module")
def node(lab):
    """The class that a contributor writes, and its node."""
    base = importlib.import_module("dmap_pack.dmap_core.solvers.base")
    samplers = importlib.import_module("dmap_pack.nodes.samplers")
    dmap = importlib.import_module("dmap_pack.dmap_core.solvers").DMAP

    @dataclass(frozen=True, kw_only=True)
    class Twice(dmap):
        """DMAP, of which only half the steps of K are asked for."""

        half: int = base.setting("Half the gradient steps per noise level.", default=1, least=1, most=50)
        style: str = base.choice_setting(("plain", "fancy"), "Nothing.")

        def describe(self):
            return f"Twice (half {self.half})"

    class TwiceSampler(samplers.SolverNode):
        solver = Twice
        description = "For this test."

    return TwiceSampler


def test_its_inputs_are_the_settings(node):
    info = node.GET_NODE_INFO_V1()
    assert (info["name"], info["display_name"], info["output"]) == ("DMAP_TwiceSampler", "TwiceSampler", ["SAMPLER"])
    required, optional = info["input"]["required"], info["input"]["optional"]
    assert list(required) == ["K", "zeta", "half"] and list(optional) == [
        "eta",
        "optimizer",
        "step",
        "strength",
        "jacobian",
        "every",
        "guide_start",
        "guide_end",
        "inner",
        "style",
    ]
    kind, about = required["half"]
    assert (
        kind == "INT"
        and (about["default"], about["min"], about["max"]) == (1, 1, 50)
        and about["tooltip"] == "Half the gradient steps per noise level."
    )


def test_it_runs_under_its_own_name(lab, node):
    guider = lab.guider()
    sampler = node.execute(K=1, zeta=1.0, half=1).result[0]
    latents = lab.sample(guider, sampler, 2)
    assert torch.isfinite(latents).all()
    assert guider.report.solver == "Twice (half 1)"
    with pytest.raises(ValueError, match="zeta is 0"):
        node.execute(K=1, zeta=0, half=1)
