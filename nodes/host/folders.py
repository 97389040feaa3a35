"""ComfyUI's folders: what this pack lists in them, and the files of weights, CSEs and pictures that its nodes name."""

from __future__ import annotations

import logging
import os
import re
import shutil
from itertools import islice
from pathlib import Path

import folder_paths

from ...dmap_core.files import check_name
from ...dmap_core.weights import SUFFIXES

log = logging.getLogger(__name__)

PACK = Path(__file__).resolve().parents[2]
SAMPLES = PACK / "demo" / "samples"
OFFERED = "dmap"  # folder of ComfyUI's input directory, for those
SAMPLE_FILES = (
    "emoji-blurred-128.png",
    "emoji-old-photo-64.png",
    "emoji-scratched-128.png",
    "emoji-small-32.png",
    "rooster-256.png",
    "rooster-512.png",
    "rooster-blurred-512.png",
    "rooster-holes-512.png",
    "rooster-old-photo-128.png",
    "rooster-small-64.png",
)
WEIGHTS_FOLDER = "dmap"  # below ComfyUI's models
NO_WEIGHTS = "no file yet: see the help of this node"
FOLDER = "controlnet"  # below ComfyUI's models
DIFFUSERS_FOLDER = "diffusers"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
LISTED = 10_000  # entries of a directory that are looked at to say what folders there are
SHOWN = 20  # of those folders
NAME = re.compile(r"[\w][\w .()+-]*(/[\w][\w .()+-]*)*")


def offer_folders() -> None:
    """List the small prior among the checkpoints and its CSE among the ControlNets, and make models/dmap known, the place of operators' weights."""
    shipped = PACK / "models"
    folder_paths.add_model_folder_path("checkpoints", str(shipped / "checkpoints"))
    folder_paths.add_model_folder_path(WEIGHTS_FOLDER, str(Path(folder_paths.models_dir) / WEIGHTS_FOLDER))
    folder_paths.add_model_folder_path(FOLDER, str(shipped / FOLDER))


def offer_samples() -> None:
    """Put the pack's damaged pictures into input/dmap, unless that folder is there: who empties it is not given them again."""
    folder = Path(folder_paths.get_input_directory()) / OFFERED
    if folder.exists():
        return
    part = folder.with_name(f".{OFFERED}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(SAMPLES, part)
        part.replace(folder)
    except (
        OSError
    ) as error:  # such as an input folder that may only be read: nodes find the samples in the pack, but the interface shows no preview
        log.warning("DMAP: the sample pictures cannot be copied to %s: %s", folder, error)


def input_pictures() -> list[str]:
    """Names that Load Photo offers: pictures of the input directory, as Load Image lists them, and the pack's own."""
    with os.scandir(folder_paths.get_input_directory()) as entries:
        files = sorted(entry.name for entry in entries if entry.is_file())
    return [*folder_paths.filter_files_content_types(files, ["image"]), *(f"{OFFERED}/{name}" for name in SAMPLE_FILES)]


def photo_path(name: str) -> Path:
    """The file that Load Photo names: of ComfyUI's input directory, or of output or temp where the name ends with [output] or [temp], as the interface writes it.

    Raises FileNotFoundError for one that is not there, or outside of these.
    """
    bare, given = folder_paths.annotated_filepath(name)
    root = Path(os.path.abspath(given or folder_paths.get_input_directory()))
    path = Path(os.path.normpath(root / bare))  # links that people put there are followed
    if path.is_relative_to(root) and path.is_file():
        return path
    folder, _, file = bare.replace("\\", "/").rpartition("/")
    if folder == OFFERED and file in SAMPLE_FILES:
        return SAMPLES / file
    raise FileNotFoundError(f"image: there is no {name!r} in ComfyUI's input folder; upload it, or choose another")


def weights_files() -> list[str]:
    return [name for name in folder_paths.get_filename_list(WEIGHTS_FOLDER) if name.lower().endswith(SUFFIXES)]


def find_weights(name: str, example: str = "it") -> Path:
    """The file of that name in models/dmap, nowhere else. Raises FileNotFoundError that says where to put it."""
    path = folder_paths.get_full_path(WEIGHTS_FOLDER, name)
    if path is None:
        folder = folder_paths.get_folder_paths(WEIGHTS_FOLDER)[0]
        wanted = example if name == NO_WEIGHTS else f"{name!r}"
        raise FileNotFoundError(
            f"weights: {wanted} is not there. Put {example} into {folder}, reload the page and choose it; the help page of the node says where to get it"
        )
    return Path(path)


def weights_folder(file: str | None) -> Path:
    """The folder of models/dmap that holds the file; the first one, into which it should be put, if none does."""
    found = folder_paths.get_full_path(WEIGHTS_FOLDER, file) if file else None
    return Path(found).parent if found else Path(folder_paths.get_folder_paths(WEIGHTS_FOLDER)[0])


def _diffusers_files() -> dict[str, Path]:
    """ControlNets in diffusers folders, by the name that a list shows."""
    found = {}
    for root in folder_paths.get_folder_paths(DIFFUSERS_FOLDER):
        for file in sorted(Path(root).glob(f"*/{DIFFUSERS_FILE}")) + sorted(Path(root).glob(f"*/controlnet/{DIFFUSERS_FILE}")):
            found.setdefault(f"{DIFFUSERS_FOLDER}/{file.parent.relative_to(root).as_posix()}", file)
    return found


def cse_files() -> list[str]:
    """Names of what CSEControlNetLoader can be asked for: files of models/controlnet, and ControlNets in diffusers folders."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(SUFFIXES)] + list(_diffusers_files())


def cse_path(name: str) -> Path:
    """Raises FileNotFoundError that says where files belong."""
    path = folder_paths.get_full_path(FOLDER, name) or _diffusers_files().get(name)
    if path is None:
        raise FileNotFoundError(
            f"cse: {name!r} is not there. Put the file into {folder_paths.get_folder_paths(FOLDER)[0]} and reload the page, or train one with TrainCSE"
        )
    return Path(path)


def checked_name(name: str, what: str) -> str:
    """A file or folder name relative to ComfyUI's folders. Raises ValueError for one that leads out of them."""
    name = name.strip().replace("\\", "/")
    if not NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{what}: {name[:80]!r} is no name for a file; use letters, digits, spaces and - _ . ( ), and / for a folder")
    for part in name.split("/"):
        check_name(part, what)
    return name


def new_cse_path(name: str) -> Path:
    """Where a trained CSE of that name is written: the first folder of models/controlnet."""
    name = checked_name(name, "save_name").removesuffix(".safetensors")
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"


def _picture_roots() -> dict[str, Path]:
    return {"input": Path(folder_paths.get_input_directory()), "output": Path(folder_paths.get_output_directory())}


def folder_name(folder: Path) -> str:
    """How TrainCSE names a folder of the output directory."""
    return f"output/{folder.relative_to(folder_paths.get_output_directory()).as_posix()}"


def picture_folder(name: str) -> Path:
    """The folder `input/NAME` or `output/NAME`, NAME being one or more folders below ComfyUI's input or output directory; links to folders are followed.

    Nothing but that folder is looked at. Raises ValueError for a name that leads elsewhere, and for a folder that is not there.
    """
    label, *parts = name.strip().replace("\\", "/").rstrip("/").split("/")
    root = _picture_roots().get(label)
    folder = root.joinpath(*parts) if root else None
    # a drive's letter in the name would replace the root
    if (
        folder is None
        or not parts
        or any(part.startswith(".") or not part or "\0" in part for part in parts)
        or not folder.is_relative_to(root)
    ):
        raise ValueError(f"folder: {name!r} must be input/NAME or output/NAME, a folder in ComfyUI's input or output directory")
    try:
        found = folder.is_dir()
    except OSError:  # such as a name that is too long
        found = False
    if not found:
        raise ValueError(f"folder: there is no {name}. {_existing_folders()}")
    return folder


def _existing_folders() -> str:
    """A sentence about what could be chosen: the folders right below both directories, nothing deeper."""
    found = []
    for label, root in _picture_roots().items():
        if root.is_dir():
            with os.scandir(root) as entries:
                found += [f"{label}/{entry.name}" for entry in islice(entries, LISTED) if not entry.name.startswith(".") and entry.is_dir()]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"There are {', '.join(sorted(found)[:SHOWN])}{more}"
        if found
        else "There are no folders in ComfyUI's input and output directories yet"
    )
