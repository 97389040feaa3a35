"""A results folder: what it was made with, and every finished picture with its figures. Written whole or not at all.

OUT/run.json                 the settings that all rows share; another run with other ones is refused
OUT/<row>/row.json           the row's own settings, likewise
OUT/<row>/<picture>.png      the restored picture
OUT/<row>/<picture>.json     its figures; a picture is finished when this file is there
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import write_whole
from .config import ConfigError

FIGURES = {"residual", "seconds", "denoiser_calls"}  # that every finished picture has
SHOWN = 100  # characters of a value in a message


def write_json(path: Path, value: Any) -> None:
    _whole(path, lambda part: part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="ascii"))


def write_text(path: Path, text: str) -> None:
    _whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_picture(path: Path, picture: Image.Image) -> None:
    _whole(path, lambda part: picture.save(part, format="PNG"))


def _whole(path: Path, write) -> None:
    try:
        write_whole(path, write)
    except OSError as error:
        raise ConfigError(f"out: {path} could not be written (is the disk full?): {error}") from error


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """A CSV file of records, whose columns are all the names that they have."""
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError for a file that is none of ours."""
    try:
        found = json.loads(path.read_text(encoding="ascii"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"out: {path} cannot be read ({error}); remove it to compute it again") from error


def plain(value: Any) -> Any:
    """As JSON would give it back: tuples become lists, paths and the like text."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def check_same(path: Path, wanted: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Raises ConfigError, naming what differs, if the file is there and says something else than `wanted`.

    defaults: what is meant where the file says nothing, as one of an earlier version.
    """
    if not path.exists():
        return
    found, wanted = read_json(path), plain(wanted)
    for name, value in plain(defaults or {}).items():
        found[name] = value | found.get(name, {}) if isinstance(value, dict) else found.get(name, value)
    different = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if different:
        listed = "; ".join(f"{name} was {str(found.get(name))[:SHOWN]} and is {str(wanted.get(name))[:SHOWN]}" for name in different)
        raise ConfigError(
            f"out: {path} holds results of other settings, which are not mixed: {listed}. Choose another folder, or remove it"
        )


def read_picture_json(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures of a finished picture; None if it is not finished. Raises ConfigError if it was made of another original."""
    if not path.exists():
        return None
    entry = read_json(path)
    if not path.with_suffix(".png").exists() and "diverged" not in entry:
        return None  # the picture was taken away: make it again
    if entry.get("original") != plain(identity):
        raise ConfigError(
            f"out: {path} was made of another picture, or of one at another place in the list (then {entry.get('original')}, now {identity}). "
            "Keep the pictures of a run as they are, or choose another folder"
        )
    if "diverged" not in entry and not (isinstance(entry.get("metrics"), dict) and entry.keys() >= FIGURES):
        raise ConfigError(f"out: {path} lacks figures; remove it to compute it again")
    return entry
