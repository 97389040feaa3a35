"""A workflow as the interface saves it -> a prompt as the API takes it."""

from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")


def node_inputs(info: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, type, options) of a node's inputs in the interface's order, required before optional."""
    inputs = info["input"]
    return [
        (name, spec[0], spec[1] if len(spec) > 1 else {})
        for group in ("required", "optional")
        for name, spec in inputs.get(group, {}).items()
    ]


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def widget_names(info: dict[str, Any]) -> list[str | None]:
    """Names of a node's saved widget values; None for the ones that only the interface uses."""
    names: list[str | None] = []
    for name, kind, options in node_inputs(info):
        if is_widget(kind, options):
            names.append(name)
            if options.get("control_after_generate") or options.get("image_upload"):
                names.append(None)
    return names


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """API-format prompt of a UI-format workflow (schema 0.4) without subgraphs. Raises KeyError for a node that the server lacks."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node.get("mode", 0) != 0:
            continue
        values = dict(zip(widget_names(object_info[node["type"]]), node.get("widgets_values") or [], strict=True))
        values.pop(None, None)
        linked = {slot["name"]: sources[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": {**values, **linked},
            "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


def titled(prompt: dict[str, Any], title: str) -> str:
    """Id of the one node with that title."""
    (found,) = [key for key, node in prompt.items() if node["_meta"]["title"] == title]
    return found


def use_picture(prompt: dict[str, Any], title: str, name: str) -> None:
    """Put Load Image in the place of the sample picture with that title; name is a file in the input folder."""
    prompt[titled(prompt, title)] |= {"class_type": "LoadImage", "inputs": {"image": name}}


def upstream(prompt: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
    """The part of a prompt that these nodes need."""
    needed: dict[str, Any] = {}
    waiting = list(outputs)
    while waiting:
        key = waiting.pop()
        if key not in needed:
            needed[key] = prompt[key]
            waiting += [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return needed
