"""A node's schema with fields that only newer hosts know."""

from __future__ import annotations

from dataclasses import fields

from comfy_api.latest import io

KNOWN = frozenset(field.name for field in fields(io.Schema))
NEWER = frozenset({"search_aliases", "essentials_category"})  # what hosts from 0.3.64 on may lack


def schema(**settings) -> io.Schema:
    """io.Schema(**settings); of the newer fields, those that this host has."""
    return io.Schema(**{name: value for name, value in settings.items() if name in KNOWN or name not in NEWER})


def advanced(given: io.Input) -> io.Input:
    """The input, hidden by the interface until advanced inputs are asked for. Older hosts have no argument for it, but pass extra_dict on."""
    given.extra_dict["advanced"] = True
    return given
