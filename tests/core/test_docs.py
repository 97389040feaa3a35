"""What the documents name is there: links, paths, commands, targets of make, and nodes by the names that users see."""

import ast
import contextlib
import functools
import importlib.util
import io
import re
import shlex
import unicodedata
from pathlib import Path

from dmap_core import cli

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("", ".github", "docs", "docs/report", "web/docs", "demo", "studies")
# CHANGELOG.md tells of what was
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md") if page.name != "CHANGELOG.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
EMPHASISED = re.compile(r"\*\*([^*\n]+)\*\*|(?<!\*)\*([^*\n]+)\*(?!\*)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TEST_FILE = re.compile(r"(?<![\w/])((?:core|demo|nodes|server|browser)/test_\w+\.py)")
SOURCES = ("dmap_core", "nodes", "docs", "tests", "tools", "demo", "benchmarks", "studies", "web", ".github")
MADE = {"training.yaml", "table.md"}  # by a reader or a run
# ComfyUI's own nodes that the documents speak of
HOSTS = {"KSampler", "BasicGuider", "SamplerCustomAdvanced", "CFGGuider", "DualCFGGuider"}
NODE_NAME = re.compile(r"Operator: .+|DMAP ?[A-Z].+|.+ Study|\w+(Sampler|Guider|Scheduler|Preset|Loader|CSE|Dataset|Metrics)|Degrade")


def text(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    return FENCE.sub("", text(page))


def blocks(page):
    """Shell commands of a page, one string each: lines that end in a backslash go on, variables are put in."""
    for language, block in FENCE.findall(text(page)):
        if language not in ("", "sh", "bash"):
            continue
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            assigned = re.fullmatch(r"(\w+)=(\"[^\"]*\"|'[^']*')", line.strip())
            if assigned:
                variables[assigned[1]] = assigned[2][1:-1]
                continue
            yield re.sub(r"\$(\w+)", lambda name, known=variables: known.get(name[1], name[0]), line.partition("  #")[0]).strip()


def commands(page):
    """The commands of a page, in blocks and in backquotes, of programs that this repository has a say in."""
    candidates = [*blocks(page), *re.findall(r"`([^`\n]+)`", prose(page))]
    return [code.strip() for code in candidates if re.match(r"(\w+=\S+ )*(make|python|dmap|accelerate) ", code)]


def anchors(page):
    """What GitHub makes of headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        letters = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add("".join(c for c in letters if c in " -_" or unicodedata.category(c)[0] in "LN").replace(" ", "-"))
    return found


def display_names():
    """Names of nodes by node id, without what is in brackets behind them: titles of the help pages (tests/nodes/test_names.py holds those)."""
    return {page.stem: text(page).partition("\n")[0].removeprefix("# ").partition(" (")[0] for page in (ROOT / "web" / "docs").glob("*.md")}


def everywhere(find):
    """What `find` finds in the pages, with the names of those."""
    return [f"{page.relative_to(ROOT)}: {found}" for page in PAGES for found in find(page)]


def test_links():
    def broken(page):
        for target in LINK.findall(prose(page)):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if not re.match(r"\w+:", target) and (not there.exists() or (anchor and anchor not in anchors(there))):
                yield target

    assert everywhere(broken) == []


def test_paths():
    """Files and folders in backquotes are there: from the root of the repository, the page's own folder, dmap_core or tests, or by name alone."""
    roots = [ROOT, ROOT / "dmap_core", ROOT / "tests"]
    tops = {path.name for root in roots for path in root.iterdir() if path.is_dir()} - {"models", "output"}  # ComfyUI has these as well
    names = {path.name for folder in SOURCES for path in (ROOT / folder).rglob("*.*")} | {path.name for path in ROOT.glob("*.*")}

    def missing(page):
        for code in re.findall(r"`([\w.-]+(?:/[\w.-]*)*)`", prose(page)) + TEST_FILE.findall(text(page)):
            claimed = code.endswith((".py", ".md", ".yaml")) or ("/" in code and code.split("/")[0] in tops)
            there = any((root / code).exists() for root in (*roots, page.parent)) or ("/" not in code and code in names)
            if claimed and not there and code not in MADE:
                yield code

    assert everywhere(missing) == []


def options(command):
    """Options of a command of `dmap`; raises ValueError where there is no such command."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    if not told.getvalue():
        raise ValueError(f"dmap has no command {command}")
    return set(re.findall(r"--[a-z][\w-]*", told.getvalue()))


def test_commands():
    targets = set(re.findall(r"^([\w-]+):", text(ROOT / "Makefile"), re.M))
    of = functools.cache(options)

    def unknown(command):
        words = shlex.split(command.replace("...", ""))
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words[:2] == ["accelerate", "launch"] and "-m" in words:
            words = ["python", *words[words.index("-m") :]]
        match words:
            case ["make", *rest]:
                return [word for word in rest if re.fullmatch(r"[a-z-]+", word) and word not in targets]
            case ["python", "-m", module, *_]:
                there = module in ("pip", "pytest") or (ROOT / module / "__main__.py").exists() or importlib.util.find_spec(module)
                return [] if there else [module]
            case ["python", file, *_] if file.endswith(".py"):
                return [] if (ROOT / file).exists() else [file]
            case ["dmap", name, *rest] if name.islower() and name[0] != "-":
                return sorted({word for word in rest if word.startswith("--")} - of(name))
        return []

    assert everywhere(lambda page: (f"{command}: {word}" for command in commands(page) for word in unknown(command))) == []


def test_nodes():
    names = set(display_names().values()) | HOSTS

    def unknown(page):
        emphasised = {part.strip() for pair in EMPHASISED.findall(prose(page)) for part in pair}
        return sorted(name for name in emphasised if NODE_NAME.fullmatch(name) and name not in names)

    assert everywhere(unknown) == []


def test_every_node_is_listed_with_its_help_page():
    listed = re.findall(r"\[([^\]]*)\]\(\.\./web/docs/(\w+)\.md\)", text(ROOT / "docs" / "nodes.md"))
    assert {page: name for name, page in listed} == display_names()
    assert len(listed) == len(display_names())


def test_every_help_page_has_a_small_picture():
    """The interface finds pictures from the page's own folder."""
    folder = ROOT / "web" / "docs"
    shown = {page.stem: re.findall(r"!\[[^\]]+\]\((\S+)\)", text(page)) for page in folder.glob("*.md")}
    assert {name: pictures for name, pictures in shown.items() if pictures != [f"images/{name}.webp"]} == {}
    files = {path.stem: path.stat().st_size for path in (folder / "images").iterdir()}
    assert files.keys() == shown.keys() and max(files.values()) <= 40_000


def test_rooms_are_drawn_in_their_order():
    tree = ast.parse(text(ROOT / "tests" / "core" / "test_imports.py"))
    (order,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "ORDER")
    drawn = re.findall(
        r"^    (\w+)", next(block for _, block in FENCE.findall(text(ROOT / "ARCHITECTURE.md")) if "dmap_core/" in block), re.M
    )
    assert tuple(drawn) == ast.literal_eval(order)
