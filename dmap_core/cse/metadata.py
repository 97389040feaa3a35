"""What a CSE file says about itself: JSON under one key of the safetensors metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..operators import Operator, spec_in_words
from ..prior import NetworkPrior
from .settings import HINT_RANGES, PREDICTIONS, TrainingSettings

KEY = "dmap_cse"
LONGEST = 1_000_000  # characters; an inpainting mask is the longest thing in it
LONGEST_TEXT = 10_000  # characters, of a name or a licence
DEEPEST = 40  # lists in lists; printing or comparing what is deeper could exhaust the stack
TEXTS = ("base", "prediction", "hint_range", "licence", "fingerprint", "source")
NUMBERS = ("steps", "pictures", "batch_size", "size", "seed")


@dataclass(frozen=True)
class CSEMetadata:
    """operator: its spec. base: the checkpoint's name; fingerprint: of its UNet; prediction: "eps", "v" or "flow". hint_range: "0..1" or "-1..1".

    steps, batch_size, learning_rate, size, seed: of the training. pictures: how many; source: where they came from. licence: of the file,
    as its maker states it. Fields that a file lacks have these defaults.
    """

    operator: dict[str, Any] | None = None
    base: str = ""
    fingerprint: str = ""
    prediction: str = "eps"
    hint_range: str = "0..1"
    steps: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    size: int = 0
    seed: int = 0
    pictures: int = 0
    source: str = ""
    licence: str = ""

    @classmethod
    def of_training(
        cls, prior: NetworkPrior, settings: TrainingSettings, operator: Operator, base: str, pictures: int, source: str, licence: str
    ) -> CSEMetadata:
        """Of a training that has not begun."""
        return cls(
            operator=operator.spec(),
            base=base,
            fingerprint=prior.fingerprint,
            prediction=prior.prediction,
            hint_range=settings.hint_range,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            size=settings.size,
            seed=settings.seed,
            pictures=pictures,
            source=source,
            licence=licence,
        )

    def write(self) -> dict[str, str]:
        """The metadata of a safetensors file. Raises ValueError for what `read_metadata` would not take, such as too many masks."""
        text = json.dumps(asdict(self), sort_keys=True)
        if len(text) > LONGEST:
            raise ValueError(
                f"the description of the CSE would be {len(text)} characters long, and {LONGEST} are the most; most of it is the operator's spec. "
                "An inpainting operator with a batch of masks is one: train with a single mask, a smaller or a simpler one"
            )
        found = {"format": "pt", KEY: text}
        try:
            read_metadata(found)
        except ValueError as error:
            raise ValueError(f"the CSE's file could not be read again: {error}") from error
        return found

    def trained_for(self) -> str:
        """The operator in one line, such as `Super-Resolution (scale 8)`; long settings (a mask) are left out."""
        return "an unknown operator" if self.operator is None else spec_in_words(self.operator)

    def other_operator(self, operator: Operator, file: str) -> str:
        """What is to be said where the CSE of a file was trained for another operator than this one; empty where it fits, or is not known."""
        spec = json.loads(json.dumps(operator.spec()))  # as a file has it: lists, where an operator has tuples
        if self.operator in (None, spec):
            return ""
        return f"the CSE {file} was trained for {self.trained_for()}, and the operator here is {operator.describe()}"

    def summary(self) -> str:
        """A few lines for people."""
        return (
            f"trained for {self.trained_for()} on {self.base or 'an unknown base model'} ({self.prediction}-prediction), {self.pictures} pictures"
            f"{f' ({self.source})' if self.source else ''}, {self.steps} steps of {self.batch_size} at {self.size}x{self.size} pixels, "
            f"learning rate {self.learning_rate:g}, hint in {self.hint_range}, licence: {self.licence or 'not stated'}"
        )


def read_metadata(metadata: Mapping[str, str] | None) -> CSEMetadata | None:
    """What a file's safetensors metadata says; None for a file that was not made here.

    Raises ValueError for values of the wrong kind: the file may come from anybody.
    """
    text = (metadata or {}).get(KEY)
    if text is None:
        return None
    if len(text) > LONGEST:
        raise ValueError(f"its description ({KEY}) is {len(text)} characters long, which no trainer of this pack writes")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or too deep
        raise ValueError(f"its description ({KEY}) is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"its description ({KEY}) is not a JSON object")
    known = {f.name: values[f.name] for f in fields(CSEMetadata) if f.name in values}
    _check_depth(known)
    kinds = dict.fromkeys(TEXTS, str) | dict.fromkeys(NUMBERS, int) | {"learning_rate": (int, float), "operator": (dict, type(None))}
    for name, value in known.items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**64):
            raise ValueError(f"its description ({KEY}) has a {name} of the wrong kind: {str(value)[:40]!r}")
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise ValueError(f"its description ({KEY}) has a {name} of {len(value)} characters; {LONGEST_TEXT} are the most")
    try:
        json.dumps(known, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half a character
        raise ValueError(f"its description ({KEY}) has text that cannot be printed: {error}") from error
    found = CSEMetadata(**known)
    if found.hint_range not in HINT_RANGES or found.prediction not in PREDICTIONS:
        raise ValueError(
            f"its description ({KEY}) has an unknown hint range or prediction: {found.hint_range[:20]!r}, {found.prediction[:20]!r}"
        )
    return found


def _check_depth(known: dict[str, Any]) -> None:
    """Raises ValueError for lists in lists without end."""
    level, depth = [known], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"its description ({KEY}) has lists or objects more than {DEEPEST} inside each other")
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
