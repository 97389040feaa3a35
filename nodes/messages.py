"""What messages call an operator: its node, not its class."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..dmap_core.operators import OPERATORS

NODES = {name: f"Operator: {kind.title}" for name, kind in OPERATORS.items()}
_CLASS = re.compile(rf"(?<!Operator: )\b({'|'.join(NODES)})\b(: )?")


def of_nodes(message: str) -> str:
    """A message of dmap_core in which operators have the names of their nodes."""
    return _CLASS.sub(lambda found: f"{NODES[found[1]]}: " if found[2] else OPERATORS[found[1]].title, message)


def node_of(value: object) -> str:
    """What a message calls a value of ComfyUI: its class, which for most guiders is the name of their node."""
    name = type(value).__name__
    return {"Guider_Basic": "BasicGuider", "Guider_DualCFG": "DualCFGGuider"}.get(name, name)


@contextmanager
def speaking_of_nodes(name: str = "") -> Iterator[None]:
    """ValueErrors of dmap_core in the context name nodes where they name operators' classes, and begin with `name`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(name + of_nodes(str(error))) from error
