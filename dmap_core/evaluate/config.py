"""What a table run computes: a YAML file, or the options of the command line, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..backends.families import MOST_GUIDANCE
from ..consistency import matchable
from ..cse.settings import PRECISIONS, PREDICTION_OPTIONS
from ..files import slug
from ..gradient import STRATEGIES
from ..metrics import PICTURE_METRICS, SET_METRICS, check_names
from ..operators import Operator, from_spec
from ..operators.base import real, whole
from ..presets import MODELS, Preset, preset
from ..presets import NAMES as PRESETS
from ..schedule import SPACINGS
from ..solvers import SOLVERS, Solver, Unguided
from ..solvers.base import WINDOW

AS_GIVEN = "as given"  # the measurement itself, enlarged if it is smaller
ALONE = "CSE alone"  # the model with its CSE, unguided (Fig. 7)
NAMES = (AS_GIVEN, *dict.fromkeys([*PRESETS, *SOLVERS]), ALONE)
ALONE_STEPS = {MODELS[0]: (500, "paper"), MODELS[1]: (20, "exponential")}
MIOU = "miou"  # of the labels that a segmentation operator finds in the restored picture, against the measurement
MATCHED = " matched"  # behind the name of a metric: that of the picture after `consistency.match`
MISMATCHES = ("mismatch", "mismatch_worst")  # in grey levels of 255
COSTS = ("residual", *MISMATCHES, "seconds", "denoiser_calls", "peak_memory")  # columns that every table has
SEEDS = 3  # of every picture
SHOWN = 80  # characters of a value in a message
FILES = ("cse", "guidance", "checkpoint")  # of a row
PATHS = ("images", "checkpoint", "weights")
TEXTS = ("title", "note", "prompt", "expected")
UNREADABLE = ("refuse", "skip")  # what is done about files that cannot be read
MOST = {
    "count": 10**7,
    "size": 16_384,
    "published_n": 10**9,
    "batch": 4096,
    "repeats": 10**6,
    "steps": 10**6,
}  # more cannot have been meant


class ConfigError(ValueError):
    """A table run that cannot be made."""


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table: an operator, a solver and its settings.

    settings, steps and spacing replace those of the solver's preset; start: below 1 it begins with the measurement's own picture (`presets.Preset`); with steps, spacing and zeta given, no preset is asked. cse: a ControlNet file; guidance: a TAESD file, whose decoder gradients take; checkpoint: another base model than the
    table's (Table 9). published: the paper's figures, by the name of the metric.
    """

    name: str
    operator: str
    solver: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    spacing: str | None = None
    start: float = 1.0
    cse: Path | None = None
    guidance: Path | None = None
    checkpoint: Path | None = None
    prediction: str | None = None
    published: dict[str, float] = field(default_factory=dict)

    def slug(self) -> str:
        """A folder name of the row."""
        return slug(f"{self.operator} {self.name}")


@dataclass(frozen=True)
class Config:
    """A table. operators: specs by the names that rows use. images: a folder, of which the first `count` pictures by name are taken.

    size: pictures are resized (shorter side) and centre-cropped to it; None takes them as they are, which must then be equal in size.
    distilled_guidance: of base models into which a guidance was distilled (Flux.1 dev); None: their usual one.
    settings_for: whose presets fill in what rows leave out, one of `presets.MODELS`. seed: of the first picture, the next one's is `stride` more; each takes three (SEEDS), and with stride 0 all have the same.
    last: take the last `count` pictures instead of the first.
    batch: pictures restored at once, which changes results by rounding, amplified (docs/solvers.md). repeats: restorations of every picture, each
    with a seed of its own (Table 3). published_n: over how many pictures the published figures are. unreadable: what is done about files of `images`
    that cannot be read, one of UNREADABLE. match: measure every picture once more after it was matched to its measurement.
    rounded: measurements have 8 bits, as if they had come from a picture file. tile: pixels of a side of the tiles on which networks run, a multiple of 64 of
    at least 128; None: whole pictures.
    """

    operators: dict[str, dict[str, Any]]
    rows: tuple[Row, ...]
    images: Path | None = None
    checkpoint: Path | None = None
    title: str = ""
    note: str = ""
    count: int | None = None
    size: int | None = None
    seed: int = 0
    stride: int = SEEDS
    last: bool = False
    precision: str = "fp32"
    prompt: str = ""
    prediction: str = "auto"
    distilled_guidance: float | None = None
    metrics: tuple[str, ...] = ("psnr", "ssim")
    settings_for: str = MODELS[0]
    weights: Path | None = None
    memory: str = "auto"
    batch: int = 1
    repeats: int = 1
    expected: str = ""
    published_n: int | None = None
    unreadable: str = UNREADABLE[0]
    match: bool = False
    rounded: bool = False
    tile: int | None = None

    def operator(self, name: str) -> Operator:
        return from_spec(dict(self.operators[name]), lambda file: find_weights(file, self.weights))

    def measured(self, operator: Operator) -> list[str]:
        """Names of the figures of every picture of an operator's rows."""
        names = [name for name in self.metrics if name not in SET_METRICS]
        if self.match and matchable(operator) is None:
            names += [name + MATCHED for name in names if name != MIOU]
        return names

    def plan(self, row: Row) -> Preset | None:
        """Solver, settings, steps and spacing of a row; None for `as given`."""
        if row.solver == AS_GIVEN:
            return None
        if row.solver == ALONE:
            steps, spacing = ALONE_STEPS[self.settings_for]
            found = Preset(Unguided(), steps, spacing, "the number of steps of DPS")
        elif row.steps and row.spacing and _essential(row.solver) <= row.settings.keys():
            return Preset(solver_class(row.solver)(**row.settings), row.steps, row.spacing, "config", row.start)
        else:
            found = preset(self.operator(row.operator), row.solver, self.settings_for)
        if row.steps:
            found = found.with_steps(row.steps)
        return replace(found.with_settings(**row.settings), spacing=row.spacing or found.spacing, start=row.start)

    def checkpoint_of(self, row: Row) -> Path:
        """The row's base model. Raises ConfigError where there is none."""
        found = row.checkpoint or self.checkpoint
        if found is None:
            raise ConfigError("checkpoint: no base model is given (--checkpoint)")
        return found


def find_weights(file: str, folder: Path | None) -> Path:
    path = (folder or Path()) / Path(file).name
    if folder is None or not path.is_file():
        raise ConfigError(f"operators: the weights file {file} is needed; name its folder with --weights (now {folder or 'not given'})")
    return path


def solver_class(name: str) -> type[Solver]:
    """The solver of a row's, or of a preset's, solver."""
    return Unguided if name == ALONE else SOLVERS[name.removesuffix(" full")]


def _essential(solver: str) -> set[str]:
    """The settings that a row must have to do without a preset: those without a default, or whose default fits one number of steps only."""
    described = solver_class(solver).described()
    found = {name for name, (field, about) in described.items() if field.default is MISSING or about.scales == WINDOW}
    return found | ({"K"} if solver.endswith(" full") else set())


def _known(given: Mapping[str, Any], cls: type, where: str) -> None:
    names = [f.name for f in fields(cls)]
    unknown = sorted(str(name) for name in given if name not in names)
    if unknown:
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(names)}")


def read_config(file: Path, **changes: Any) -> Config:
    """The config of a YAML file; paths in it are relative to it. `changes` that are not None come first. Raises ConfigError."""
    import yaml

    file = Path(file)
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # no text, a number of thousands of digits, or too deep
        raise ConfigError(f"config: {file} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"config: {file} must map names to values; docs/studies.md has an example")
    for name in PATHS:
        if given.get(name) is not None:
            given[name] = _relative(given[name], file, name)
    rows = given.get("rows")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            row |= {name: _relative(row[name], file, name) for name in FILES if row.get(name) is not None}
    return make_config(given | {name: value for name, value in changes.items() if value is not None}, str(file))


def _relative(value: Any, file: Path, name: str) -> Path:
    if not isinstance(value, str):
        raise ConfigError(f"{file}: {name} is {value!r}; it must be a path")
    try:
        return (file.parent / Path(value).expanduser()).resolve()
    except (ValueError, RuntimeError, OSError) as error:  # a zero byte, somebody's home that is not there, links in a circle
        raise ConfigError(f"{file}: {name} is {value[:SHOWN]!r}, which is no path: {error}") from error


def _text(value: Any, what: str) -> str:
    """Raises ConfigError unless it is text that a file can hold."""
    try:
        if isinstance(value, str):
            value.encode("utf-8")
            return value
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} is {value[:SHOWN]!r}, which is no valid text") from error
    raise ConfigError(f"{what} is {str(value)[:SHOWN]}; it must be text")


def _whole(name: str, value: Any, least: int) -> int:
    number = whole(name, value, least)
    if number > MOST.get(name, number):
        raise ValueError(f"{name} is too large; it must be at most {MOST[name]}")
    return number


def _check_operator(name: Any, spec: Any, where: str) -> None:
    """The parts of an operator that are the same for all; its settings are checked when it is made."""
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{where}: operators: the name {name!r} is no text; write it in quotes")
    _text(name, f"{where}: operators: a name")
    if not isinstance(spec.get("operator", ""), str) or not all(isinstance(key, str) for key in spec):
        raise ConfigError(
            f"{where}: operators: {name} is {str(spec)[:SHOWN]}; it must map names of settings to values, among them operator, "
            "such as {operator: SuperResolution, scale: 8}"
        )


def make_config(given: Mapping[str, Any], where: str = "options") -> Config:
    """A config of plain values, every part of it checked that can be checked without files. Raises ConfigError that names the part."""
    _known(given, Config, where)
    rows, operators = given.get("rows"), given.get("operators")
    if not isinstance(operators, dict) or not operators or not all(isinstance(spec, dict) for spec in operators.values()):
        raise ConfigError(f"{where}: operators must map names to operators, such as sr8: {{operator: SuperResolution, scale: 8}}")
    for name, spec in operators.items():
        _check_operator(name, spec, where)
    if not isinstance(rows, (list, tuple)) or not rows:
        raise ConfigError(f"{where}: rows must be a list of rows, such as {{operator: sr8, solver: DMAP}}")
    values: dict[str, Any] = dict(given) | {"rows": tuple(_row(row, f"{where}: row {i + 1}", operators) for i, row in enumerate(rows))}
    if isinstance(values.get("metrics"), str):
        values["metrics"] = [name.strip() for name in values["metrics"].split(",")]
    if not isinstance(values.get("metrics") or [], (list, tuple)):
        raise ConfigError(f"{where}: metrics is {values['metrics']!r}; it must be a list of names")
    values["metrics"] = tuple(values.get("metrics") or Config.metrics)
    for name in TEXTS:
        _text(values.get(name, ""), f"{where}: {name}")
    values |= {name: Path(values[name]) for name in PATHS if values.get(name) is not None}
    try:
        check_names(name for name in values["metrics"] if name != MIOU)
        for name, least in (("count", 1), ("size", 8), ("published_n", 1), ("tile", 128)):
            if values.get(name) is not None:
                values[name] = _whole(name, values[name], least)
        if values.get("tile") and values["tile"] % 64:
            raise ValueError(f"tile is {values['tile']}; it must be a multiple of 64 pixels")
        for name, least, default in (("seed", 0, 0), ("stride", 0, SEEDS), ("batch", 1, 1), ("repeats", 1, 1)):
            values[name] = _whole(name, values.get(name, default), least)
        if values.get("distilled_guidance") is not None:
            values["distilled_guidance"] = float(real("distilled_guidance", values["distilled_guidance"], MOST_GUIDANCE))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    for name in ("last", "match", "rounded"):
        if not isinstance(values.get(name, False), bool):
            raise ConfigError(f"{where}: {name} is {str(values[name])[:SHOWN]}; it must be true or false")
    config = Config(**values)
    choices = {
        "precision": PRECISIONS,
        "settings_for": MODELS,
        "prediction": PREDICTION_OPTIONS,
        "memory": ("auto", *STRATEGIES),
        "unreadable": UNREADABLE,
    }
    for name, options in choices.items():
        if getattr(config, name) not in options:
            raise ConfigError(f"{where}: {name} is {getattr(config, name)!r}; it must be one of {'; '.join(options)}")
    slugs = [row.slug() for row in config.rows]
    twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
    if twice:
        raise ConfigError(f"{where}: several rows are called {twice[0]}; give each a name of its own (name: ...)")
    return config


def _row(given: Any, where: str, operators: Mapping[str, Any]) -> Row:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: it is {given!r}; it must be a mapping such as {{operator: sr8, solver: DMAP}}")
    _known(given, Row, where)
    choices = {"operator": tuple(operators), "solver": NAMES}
    choices |= {
        name: options for name, options in (("spacing", tuple(SPACINGS)), ("prediction", PREDICTION_OPTIONS)) if given.get(name) is not None
    }
    for name, options in choices.items():
        if given.get(name) not in options:
            raise ConfigError(f"{where}: {name} is {given.get(name)!r}; it must be one of {', '.join(map(str, options))}")
    steps = given.get("steps")
    try:
        steps = None if steps is None else _whole("steps", steps, 2)
        start = real("start", given.get("start", 1.0), 1.0)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if start < 1 and given["solver"] in (AS_GIVEN, ALONE):
        raise ConfigError(f"{where}: start is {start:g}, and {given['solver']!r} does not begin with the measurement; leave it out")
    if given.get("guidance") is not None and given["solver"] in (AS_GIVEN, ALONE):
        raise ConfigError(f"{where}: guidance is given, and {given['solver']!r} has none; leave it out")
    if given["solver"] == ALONE and not given.get("cse"):
        raise ConfigError(f"{where}: {ALONE!r} needs a cse, the ControlNet file")
    paths = {name: Path(given[name]) for name in FILES if given.get(name) is not None}
    settings = given.get("settings") or {}
    _check_settings(given["solver"], settings, where)
    published = given.get("published") or {}
    if not isinstance(published, dict) or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in published.values()):
        raise ConfigError(f"{where}: published must map metrics to numbers")
    columns = (*PICTURE_METRICS, *SET_METRICS, MIOU, *COSTS)
    unknown = [str(name) for name in published if name not in columns]
    if unknown:
        raise ConfigError(f"{where}: published has {', '.join(unknown)}; it can have {', '.join(columns)}")
    name = given.get("name") or given["solver"]
    if isinstance(name, (int, float)) and not isinstance(name, bool):  # as of `name: 4.8`
        name = str(name)
    _text(name, f"{where}: name")
    values: dict[str, Any] = (
        dict(given) | paths | {"name": name, "settings": settings, "steps": steps, "start": start, "published": published}
    )
    return Row(**values)


def _check_settings(solver: str, settings: Any, where: str) -> None:
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: settings is {settings!r}; it must map names to values, such as {{zeta: 4.8}}")
    known = {} if solver == AS_GIVEN else solver_class(solver).described()
    unknown = sorted(str(name) for name in settings if name not in known)
    if unknown:
        raise ConfigError(f"{where}: {solver} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    for name, value in settings.items():
        kinds, what = (str, "text") if known[name][1].choices else ((int, float), "a number")
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ConfigError(f"{where}: the setting {name} is {value!r}; it must be {what}")
