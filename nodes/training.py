"""How a conditional score estimator is made: TrainCSE and SelfGenerateCSEDataset."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..dmap_core.cse.checkpoint import training_files
from ..dmap_core.cse.data import Examples
from ..dmap_core.cse.identity import digest, identity
from ..dmap_core.cse.metadata import CSEMetadata
from ..dmap_core.cse.network import initial_controlnet
from ..dmap_core.cse.session import Session
from ..dmap_core.cse.settings import HINT_RANGES, PRECISIONS, TrainingSettings
from ..dmap_core.cse.trainer import Trainer
from ..dmap_core.pictures import (
    centred,
    file_identity,
    file_version,
    folder_files,
    ignored_files,
    named,
    open_rgb,
    picture_files,
    to_picture,
    to_tensor,
)
from .charts import loss_curve
from .cse import CATEGORY
from .host.controlnet import load_cse
from .host.folders import folder_name, new_cse_path, picture_folder
from .host.prior import base_name, check_model, check_vae, model_sigmas
from .host.training import Progress, self_generate, training
from .messages import speaking_of_nodes
from .operators import Operator
from .pictures import to_core

log = logging.getLogger(__name__)
NO_FOLDER = "the pictures input"
PREVIEWS = 100  # of the loss curve during a training
VALIDATED = 4  # pictures


class SelfGenerateCSEDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_SelfGenerateCSEDataset",
            display_name="SelfGenerateCSEDataset",
            category=CATEGORY,
            description="Training pictures for a CSE from the model itself, saved in the output folder. A run that was cut goes on where it was.",
            inputs=[
                io.Model.Input("model", tooltip="The base model of the CSE."),
                io.Conditioning.Input("positive", tooltip="The prompt (the paper's authors: empty)."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Int.Input("count", default=100, min=1, max=100000, tooltip="Pictures (paper: 100 are enough)."),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Euler-ancestral steps of each (the paper's authors: 50)."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance; 1 is none. Useful with a prompt only.",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Width of the pictures in pixels: what the model was trained for.",
                ),
                io.Int.Input("height", default=512, min=16, max=4096, step=8, tooltip="Height of the pictures in pixels."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of the first picture; picture i has seed + i.",
                ),
                io.String.Input(
                    "save_name",
                    default="cse-pictures",
                    tooltip="Folder in ComfyUI's output directory; output/NAME is what TrainCSE calls it.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="What the pictures should not show. Used only if cfg is not 1."),
            ],
            outputs=[
                io.Image.Output(display_name="pictures", tooltip="All pictures, for TrainCSE."),
                io.String.Output(display_name="folder", tooltip="Where they are; connect it to TrainCSE's folder, or write it there."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, vae, count, steps, cfg, width, height, seed, save_name, negative=None) -> io.NodeOutput:
        if negative is None and cfg != 1:
            raise ValueError(f"SelfGenerateCSEDataset: cfg is {cfg} but negative is not connected; connect it, or set cfg to 1")
        check_model(model)
        check_vae(vae, model)
        progress = Progress(count)
        files = []
        for file in self_generate(model, vae, positive, negative or positive, save_name, count, steps, cfg, (height, width), seed):
            files.append(file)
            progress.update(len(files), open_rgb(file))
        pictures = torch.cat([_image(open_rgb(file)) for file in files])
        return io.NodeOutput(pictures, folder_name(files[0].parent), ui=ui.PreviewText(f"{len(files)} pictures in {files[0].parent}"))


def _folder(folder: str | None) -> str:
    """The folder that was chosen, or "" for none."""
    folder = (folder or "").strip()
    return "" if folder == NO_FOLDER else folder


class _Trained:
    """Files that this process trained, and how often one of them was removed.

    The mere presence of the file must be in no fingerprint: the training itself changes that, and would run again right after it.
    """

    def __init__(self):
        self._there: set[Path] = set()
        self._removed: dict[Path, int] = {}

    def add(self, path: Path) -> None:
        self._there.add(path)

    def times_removed(self, path: Path) -> int:
        if path in self._there and not path.exists():
            self._there.remove(path)
            self._removed[path] = self._removed.get(path, 0) + 1
        return self._removed.get(path, 0)


_trained = _Trained()


class TrainCSE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        d = TrainingSettings()
        return io.Schema(
            node_id="DMAP_TrainCSE",
            display_name="TrainCSE",
            category=CATEGORY,
            description="Trains a CSE for one operator with about 100 pictures, and saves it in models/controlnet. A training that was cancelled or cut goes on with the "
            "same settings. The defaults are the paper's: hours on a large GPU. For several GPUs there is a command line: see the help.",
            inputs=[
                io.Model.Input("model", tooltip="The base model. A LoRA on it is part of what the CSE learns to work with."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The prompt during training (empty, as in the paper's sampling). Without a text encoder use DMAPUnconditional.",
                ),
                Operator.Input(
                    "operator",
                    tooltip="The damage that the CSE learns to see through. It is done to the pictures after their augmentation.",
                ),
                io.String.Input(
                    "folder",
                    default=NO_FOLDER,
                    tooltip="input/NAME or output/NAME: a folder with pictures in ComfyUI's input or output directory, read one by one, of any sizes. "
                    "Or connect SelfGenerateCSEDataset's folder. Leave it as it is, or empty, to train with the pictures that are connected.",
                ),
                io.String.Input("save_name", default="my-cse", tooltip="Name of the file in models/controlnet."),
                io.Int.Input(
                    "steps",
                    default=d.steps,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimiser steps in all (paper: 5000). Raise it to go on with a finished training.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=d.batch_size,
                    min=1,
                    max=4096,
                    tooltip="Pictures of one step (paper: 64). There must be at least so many.",
                ),
                io.Int.Input(
                    "accumulation",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="In how many parts a step's pictures are computed, one after the other: raise it if memory is short, up to batch_size. The result is the same.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=d.learning_rate,
                    min=1e-8,
                    max=0.1,
                    step=1e-6,
                    round=1e-9,
                    tooltip="Of Adam (paper: 0.000005). Small trainings need more, such as 0.0001.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=d.precision,
                    tooltip="Of the networks' arithmetic; the CSE's weights stay in full precision. bf16 needs half the memory on GPUs that know it.",
                ),
                io.Int.Input(
                    "size",
                    default=d.size,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Width and height of the parts of the pictures that it trains on, in pixels.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of everything random: same seed, same CSE.",
                ),
                io.Int.Input(
                    "save_every",
                    default=250,
                    min=1,
                    max=100_000,
                    tooltip="Steps between two saves, and between two validation losses (dots in the loss curve).",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    tooltip="Needs much less memory and about a third more time; the result is the same.",
                ),
                io.Image.Input("pictures", optional=True, tooltip="Training pictures as a batch, instead of a folder."),
                io.Image.Input(
                    "validation",
                    optional=True,
                    tooltip=f"Pictures to look at during training; the first {VALIDATED} training pictures without it.",
                ),
                io.Combo.Input(
                    "hint_range",
                    options=list(HINT_RANGES),
                    default=d.hint_range,
                    optional=True,
                    tooltip="Values of the hint; 0..1 is what ComfyUI's own nodes give.",
                ),
                io.Float.Input(
                    "snr_gamma",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    optional=True,
                    tooltip="Min-SNR weights of the loss; 0 is none (the paper), 5 usual. Short trainings learn faster with 1 to 5.",
                ),
                io.String.Input(
                    "licence", default="", optional=True, tooltip="Written into the file: under what licence others may use it."
                ),
                io.Combo.Input(
                    "unreadable",
                    options=["refuse", "skip"],
                    default="refuse",
                    optional=True,
                    tooltip="What to do about files of the folder that cannot be read. Their names are in the log.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(display_name="cse"),
                io.Image.Output(
                    display_name="loss_curve",
                    tooltip="Loss of the steps, and of the validation pictures with the same noise each time (dots).",
                ),
                io.Image.Output(display_name="validation", tooltip="Rows of: what the CSE sees, what it makes of it alone, the original."),
                io.String.Output(display_name="summary"),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder, save_name, **_):
        """Pictures that came or went, and a file that was removed after its training, make it run again.

        A connected input is None here: ComfyUI itself runs the node again when what is connected changes.
        """
        chosen = _folder(folder)
        files = [(file.name, *file_version(file)) for file in picture_files(picture_folder(chosen))] if chosen else []
        removed = _trained.times_removed(new_cse_path(save_name)) if save_name is not None else 0
        return hashlib.sha256(repr((files, removed)).encode()).hexdigest()

    @classmethod
    def execute(
        cls,
        model,
        vae,
        conditioning,
        operator,
        folder,
        save_name,
        save_every,
        gradient_checkpointing,
        pictures=None,
        validation=None,
        licence="",
        unreadable="refuse",
        **given,
    ) -> io.NodeOutput:
        settings = TrainingSettings(**given)
        path = new_cse_path(save_name)
        chosen, source = cls._pictures(folder, pictures, unreadable)
        size = settings.size
        with speaking_of_nodes("TrainCSE: size: "):
            operator.check((size, size), settings.batch_size // settings.accumulation)
        looked_at = [to_picture(p) for p in to_core(validation, "TrainCSE: validation")] if validation is not None else chosen
        looked_at = [p if isinstance(p, Image.Image) else open_rgb(p) for p in looked_at[:VALIDATED]]
        looked_at = torch.stack([to_tensor(centred(p, size)) for p in looked_at])
        examples = Examples(chosen, settings, len(model_sigmas(model)))
        part = settings.batch_size // settings.accumulation
        CSEMetadata(operator=operator.spec(), licence=licence).write()  # one that no file can hold should be known before the training
        with (
            training_files(path),
            training(model, vae, conditioning, settings.precision, size, part) as prior,
        ):
            try:
                controlnet = prior.new_controlnet(initial_controlnet(prior.original_weights(), settings.seed))
                trainer = Trainer(prior, controlnet, operator.to(prior.device), examples, settings, gradient_checkpointing)
                described = CSEMetadata.of_training(prior, settings, operator, base_name(model), len(chosen), source, licence)
                files = [file_identity(p) if isinstance(p, Path) else digest(to_tensor(p)) for p in chosen]
                session = Session(trainer, path, identity(prior, settings, operator, files), described, looked_at)
                session.train(save_every, on_step=cls._progress(session))
                validated = session.sheet()
            finally:
                operator.to("cpu")
        control, metadata = load_cse(path)
        _trained.add(path)
        curve = loss_curve(trainer.losses, session.validations)
        preview = ui.PreviewImage(_image(validated), cls=cls)
        return io.NodeOutput(control, _image(curve), _image(validated), f"{path.name}: {metadata.summary()}", ui=preview)

    @staticmethod
    def _progress(session: Session):
        """Moves the progress bar at every step, and shows the loss curve now and then."""
        trainer = session.trainer
        bar = Progress(trainer.settings.steps)

        def on_step(step: int) -> None:
            show = step % max(1, trainer.settings.steps // PREVIEWS) == 0
            bar.update(step, loss_curve(trainer.losses, session.validations) if show else None)

        return on_step

    @staticmethod
    def _pictures(folder, pictures, unreadable) -> tuple[list, str]:
        """(files or open pictures, where they came from)."""
        folder = _folder(folder)
        if (not folder) == (pictures is None):
            raise ValueError("TrainCSE: pictures: connect a batch of pictures, or choose a folder, not both")
        if pictures is not None:
            return [to_picture(p) for p in to_core(pictures, "TrainCSE: pictures")], "a batch in ComfyUI"
        path = picture_folder(folder)
        files, bad = folder_files(path, unreadable)
        if bad:
            log.warning("TrainCSE: %d files of %s cannot be read and are left out: %s", len(bad), folder, named(bad))
        if ignored := ignored_files(path):
            log.info("TrainCSE: %s", ignored)
        return files, folder


def _image(picture: Image.Image) -> torch.Tensor:
    """(1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).float().unsqueeze(0) / 255


NODES = [TrainCSE, SelfGenerateCSEDataset]
