"""What is done with a conditional score estimator: CSEControlNetLoader and ApplyCSE."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..dmap_core.cse.settings import HINT_RANGES
from ..dmap_core.operators import from_spec
from .host.controlnet import FROM_FILE, attach, blocked, check_base, load_cse
from .host.folders import cse_files, cse_path, find_weights
from .messages import of_nodes, speaking_of_nodes
from .operators import Operator, measurement_input
from .pictures import measurement_to_core

CATEGORY = "DMAP/cse"


class CSEControlNetLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_CSEControlNetLoader",
            display_name="CSEControlNetLoader",
            category=CATEGORY,
            description="Loads a conditional score estimator: a ControlNet trained for one damage, which gives DPS and DMAP a better start.",
            inputs=[
                io.Combo.Input(
                    "cse",
                    options=cse_files(),
                    tooltip="A ControlNet of models/controlnet (ComfyUI's or diffusers' format), or of a diffusers folder. Those that TrainCSE made know their operator.",
                )
            ],
            outputs=[
                io.ControlNet.Output(display_name="cse", tooltip="For ApplyCSE, or for ComfyUI's own ControlNet nodes."),
                Operator.Output(
                    display_name="operator",
                    tooltip="What the CSE was trained for, if the file says so; nodes behind it do not run otherwise.",
                ),
                io.String.Output(display_name="summary", tooltip="What the file says about its training."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, cse):
        """A file that was trained further is another one."""
        path = cse_path(cse)
        return f"{path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, cse) -> io.NodeOutput:
        control, metadata = load_cse(cse_path(cse))
        if metadata is None or metadata.operator is None:
            operator = blocked(
                f"CSEControlNetLoader: {cse} does not say what it was trained for. Use an Operator node instead of this output"
            )
        else:
            try:
                operator = from_spec(metadata.operator, find_weights)
            except (
                FileNotFoundError,
                ValueError,
            ) as error:  # such as a network whose weights are not there: the CSE itself does not need them
                operator = blocked(f"CSEControlNetLoader: the operator of {cse}: {of_nodes(str(error))}")
        summary = (
            metadata.summary()
            if metadata
            else "made elsewhere: its operator, base model and hint range are not known. The hint is given in 0..1"
        )
        return io.NodeOutput(control, operator, f"{cse}: {summary}", ui=ui.PreviewText(summary))


class ApplyCSE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_ApplyCSE",
            display_name="ApplyCSE",
            category=CATEGORY,
            description="Lets the CSE see the measurement: makes the hint and attaches the CSE to the conditioning. Gradients flow through it in every guided step.",
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="The prompt, on its way to DPSGuider's positive (or to a stock sampler: the CSE alone)."
                ),
                io.ControlNet.Input(
                    "cse", tooltip="From CSEControlNetLoader or TrainCSE. Other ControlNets that want the damaged picture work, too."
                ),
                measurement_input(),
                Operator.Input(
                    "operator",
                    tooltip="The same as DPSGuider's. It says how the measurement becomes a picture of the full size, such as by enlarging it.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=10.0, step=0.05, round=0.001, tooltip="1 as trained (the paper's), 0 is no CSE."
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Where in the sampling it begins to act.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, tooltip="Where in the sampling it stops acting."
                ),
                io.Combo.Input(
                    "hint_range",
                    options=[FROM_FILE, *HINT_RANGES],
                    default=FROM_FILE,
                    optional=True,
                    tooltip="Values of the hint. Our files say theirs; for ControlNets made elsewhere 'from file' means 0..1. The paper's authors trained theirs with -1..1.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Connect it to learn at once whether the CSE belongs to this model. DPSGuider checks it, too.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, conditioning, cse, measurement, operator, strength, start_percent, end_percent, hint_range=FROM_FILE, model=None
    ) -> io.NodeOutput:
        if not start_percent < end_percent:
            raise ValueError(f"ApplyCSE: start_percent is {start_percent} and end_percent {end_percent}; it must start before it ends")
        y = measurement_to_core(measurement, operator, "ApplyCSE: measurement")
        if model is not None:
            check_base(cse, model, "ApplyCSE: cse")
        if strength == 0:
            return io.NodeOutput(conditioning)
        with speaking_of_nodes("ApplyCSE: measurement: "):
            hint = (operator.hint(y) + 1) / 2
        return io.NodeOutput(attach(conditioning, cse, hint, strength, start_percent, end_percent, hint_range))


NODES = [CSEControlNetLoader, ApplyCSE]
