"""Writes locales/en/nodeDefs.json, the words of the nodes as their schemas have them, and says what locales/zh/nodeDefs.json lacks of them.

    python tools/build_locales.py

It asks a running ComfyUI (which it starts) for the nodes. A translator copies en to a folder named after the language and replaces the texts;
the interface shows the schema's own words where a language has none. The values of lists stay as they are: workflows hold them.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"
TRANSLATED = ("zh",)
# The interface reads texts as messages of vue-i18n, to which these mean something.
SPECIAL = re.compile(r"[{}|]|@(?=[\w:.])")


def key(name: str) -> str:
    """How the interface looks a name up."""
    return name.replace(".", "_")


def words(object_info: dict[str, Any]) -> dict[str, Any]:
    """The nodes of this pack in an answer of /object_info, as nodeDefs.json holds them: names of all inputs and outputs, and their tooltips if there are any."""
    return {key(node_id): _node(info) for node_id, info in sorted(object_info.items()) if node_id.startswith("DMAP_")}


def _node(info: dict[str, Any]) -> dict[str, Any]:
    inputs = {}
    for section in ("required", "optional"):
        for name, (_, *rest) in info["input"].get(section, {}).items():
            given = rest[0] if rest else {}
            inputs[key(name)] = _texts(name=given.get("display_name") or name, tooltip=given.get("tooltip"))
    tooltips = info.get("output_tooltips") or [None] * len(info["output"])
    outputs = {
        str(i): _texts(name=name, tooltip=tooltip) for i, (name, tooltip) in enumerate(zip(info["output_name"], tooltips, strict=True))
    }
    return {**_texts(display_name=info["display_name"], description=info["description"]), "inputs": inputs, "outputs": outputs}


def _texts(**texts: str | None) -> dict[str, str]:
    return {name: text for name, text in texts.items() if text}


def flat(tree: dict[str, Any], path: str = "") -> dict[str, str]:
    """Every text of a nodeDefs.json by its path, such as DMAP_Decode.inputs.vae.tooltip."""
    found = {}
    for name, value in tree.items():
        where = f"{path}.{name}" if path else name
        found.update(flat(value, where) if isinstance(value, dict) else {where: value})
    return found


def faults(english: dict[str, Any], translated: dict[str, Any]) -> list[str]:
    """What is missing in a translation, what is in it that no node has, and texts that the interface would not show as they are."""
    wanted, there = flat(english), flat(translated)
    missing = [f"{path}: no translation of {text!r}" for path, text in wanted.items() if not there.get(path, "").strip()]
    unknown = [f"{path}: no node has this" for path in there if path not in wanted]
    special = [f"{path}: {text!r} has a character that the interface does not show" for path, text in there.items() if SPECIAL.search(text)]
    return missing + unknown + special


def path_of(language: str) -> Path:
    return LOCALES / language / "nodeDefs.json"


def read(language: str) -> dict[str, Any]:
    return json.loads(path_of(language).read_text(encoding="utf-8"))


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from host import Host

    with Host() as host:
        english = words(host.object_info())
    text = json.dumps(english, indent=2, ensure_ascii=False) + "\n"
    path_of("en").write_text(text, encoding="utf-8")
    found = [f"{language}: {fault}" for language in TRANSLATED for fault in faults(english, read(language))]
    print("\n".join(found) or f"{len(flat(english))} texts in {path_of('en')}, all of them translated")
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
