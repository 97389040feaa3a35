"""What a results folder says, on folders that were made by hand: numpy and scipy know the figures."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from host import import_torchvision
from PIL import Image
from scipy import linalg, stats

from dmap_core.evaluate import report, tables
from dmap_core.evaluate.config import make_config
from dmap_core.evaluate.run import plan_jobs
from dmap_core.metrics import SET_METRICS, SetMetric

N = 6
SIZE = 16
RNG = np.random.default_rng(0)
PSNR = {row: RNG.normal(24, 2, N).round(3).tolist() for row in ("as given", "DPS", "DMAP")}
SECONDS = {row: RNG.uniform(1, 9, N).round(3).tolist() for row in PSNR}


@pytest.fixture
def made(tmp_path):
    """made(changes of a row by its name, **changes of the config) -> (config, jobs, folder), every picture of every row being finished."""

    def made(rows=None, seeds=0, **more):
        photos = tmp_path / "photos"
        photos.mkdir(exist_ok=True)
        for i in range(N):
            noise = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
            Image.fromarray(noise).save(photos / f"{i}.png")
        (tmp_path / "base.safetensors").touch()
        solvers = [{"operator": "sr8", "solver": name} | (rows or {}).get(name, {}) for name in PSNR]
        common = {"images": photos, "checkpoint": tmp_path / "base.safetensors", "metrics": ["psnr"]}
        config = make_config({"operators": {"sr8": {"operator": "SuperResolution", "scale": 8}}, "rows": solvers} | common | more)
        jobs, out = plan_jobs(config), tmp_path / "out"
        for job in jobs:
            i = job.picture.index
            write(job, out, psnr=PSNR[job.row.solver][i], seconds=SECONDS[job.row.solver][i])
        return config, jobs, out

    return made


def write(job, out, seconds=1.0, **metrics):
    file = job.file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    costs = {"seconds": seconds, "denoiser_calls": 500, "residual": 2.5, "peak_memory": None}
    file.write_text(json.dumps(job.entry() | costs | {"metrics": metrics}))
    noise = np.random.default_rng([job.picture.index, len(job.row.name)]).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file.with_suffix(".png"))


def diverge(job, out):
    job.file(out).write_text(json.dumps(job.entry() | {"diverged": "NaN"}))
    job.file(out).with_suffix(".png").unlink()


def of(jobs, solver, index):
    return next(job for job in jobs if job.row.solver == solver and job.picture.index == index)


def written(config, jobs, out):
    """(table.csv as dicts, table.md) of what is in the folder."""
    lines = tables.read_lines(config, jobs, out)
    return list(csv.DictReader(io.StringIO(tables.table_csv(config, lines)))), tables.markdown(config, jobs, lines)


def grids(text):
    """The Markdown tables in a text: lists of cells, the first line being the head."""
    found, lines = [], [*text.splitlines(), ""]
    start = None
    for i, line in enumerate(lines):
        if line.startswith("|") and start is None:
            start = i
        elif not line.startswith("|") and start is not None:
            cells = [[cell.strip() for cell in row[1:-1].split(" | ")] for row in lines[start:i]]
            assert len({len(row) for row in cells}) == 1
            found.append([cells[0], *cells[2:]])
            start = None
    return found


def interval(values):
    """(mean, half of the 95 % interval of Student's t)."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert high - np.mean(values) == pytest.approx(np.mean(values) - low)
    return np.mean(values), (high - low) / 2


def test_means_and_intervals(made):
    config, jobs, out = made()
    records, text = written(config, jobs, out)
    assert [r["row"] for r in records] == list(PSNR)
    head, *body = grids(text)[0]
    assert head == ["operator", "row", "n", "PSNR (dB)", "residual", "seconds", "denoiser calls"]
    for record, cells in zip(records, body, strict=True):
        values = PSNR[record["row"]]
        mean, half = interval(values)
        assert float(record["psnr"]) == pytest.approx(mean, rel=1e-9)
        assert (float(record["psnr_low"]), float(record["psnr_high"])) == pytest.approx((mean - half, mean + half), rel=1e-9)
        assert float(record["seconds"]) == pytest.approx(np.mean(SECONDS[record["row"]]), rel=1e-9)
        assert (record["n"], record["diverged"]) == (str(N), "0")
        seconds = f"{np.mean(SECONDS[record['row']]):.1f}"
        assert cells == ["sr8", record["row"], str(N), f"{mean:.2f} +- {half:.2f}", "2.500 +- 0.000", seconds, "500"]


def test_paired_differences(made):
    config, jobs, out = made()
    head, line = grids(written(config, jobs, out)[1])[1]
    mean, half = interval(np.subtract(PSNR["DMAP"], PSNR["DPS"]))
    assert head == ["operator", "row", "minus", "PSNR (dB)"]
    assert line == ["sr8", "DMAP", "DPS", f"{mean:+.2f} +- {half:.2f}"]


def test_pairs_are_of_the_same_pictures(made):
    """Of a table that is half finished, by processes that were at different places."""
    config, jobs, out = made()
    of(jobs, "DMAP", 1).file(out).unlink()
    of(jobs, "DPS", 4).file(out).unlink()
    of(jobs, "DPS", 5).file(out).unlink()
    records, text = written(config, jobs, out)
    assert [r["n"] for r in records] == ["6", "4", "5"]
    mean, half = interval([PSNR["DMAP"][i] - PSNR["DPS"][i] for i in (0, 2, 3)])
    assert grids(text)[1][1][3] == f"{mean:+.2f} +- {half:.2f}"


def test_a_picture_without_its_figures_is_not_finished(made):
    config, jobs, out = made()
    file = of(jobs, "DPS", 2).file(out)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {}}))
    records, text = written(config, jobs, out)
    assert [r["n"] for r in records] == ["6", "5", "6"]
    mean, half = interval([PSNR["DMAP"][i] - PSNR["DPS"][i] for i in (0, 1, 3, 4, 5)])
    assert grids(text)[1][1][3] == f"{mean:+.2f} +- {half:.2f}"


def test_those_that_diverged_are_counted(made):
    config, jobs, out = made()
    diverge(of(jobs, "DPS", 3), out)
    for i in range(N):
        diverge(of(jobs, "DMAP", i), out)
    records, text = written(config, jobs, out)
    assert [(r["n"], r["diverged"]) for r in records] == [("6", "0"), ("5", "1"), ("0", "6")]
    assert [cells[2] for cells in grids(text)[0][1:]] == ["6", "5 (1 diverged)", "0 (6 diverged)"]
    assert float(records[1]["psnr"]) == pytest.approx(np.mean(np.delete(PSNR["DPS"], 3)))
    assert grids(text)[0][3][3:] == [""] * 4 and "Paired differences" not in text


def test_rows_that_are_not_begun_are_left_out(made):
    config, jobs, out = made()
    for i in range(N):
        of(jobs, "DMAP", i).file(out).unlink()
    records, text = written(config, jobs, out)
    assert [r["row"] for r in records] == ["as given", "DPS"] and "DMAP" not in text


def test_nothing_is_finished(made):
    config, jobs, out = made()
    for job in jobs:
        job.file(out).unlink()
    assert tables.read_lines(config, jobs, out) == []


def test_one_picture_has_no_interval(made):
    config, jobs, out = made(count=1)
    records, text = written(config, jobs, out)
    assert [cells[3] for cells in grids(text)[0][1:]] == [f"{PSNR[row][0]:.2f}" for row in PSNR]
    assert "nan" not in text.lower()
    assert float(records[1]["psnr"]) == PSNR["DPS"][0]


def test_infinite_figures(made):
    config, jobs, out = made(count=2)
    for solver in PSNR:
        write(of(jobs, solver, 0), out, psnr=float("inf"))
    records, text = written(config, jobs, out)
    assert {r["psnr"] for r in records} == {"inf"} and [cells[3] for cells in grids(text)[0][1:]] == ["inf"] * 3
    assert grids(text)[1][1] == ["sr8", "DMAP", "DPS", ""]
    report.write_plots(config, tables.read_lines(config, jobs, out), out)  # where infinity has no place
    assert (out / "plots" / "psnr.png").exists()


def test_pictures_csv(made):
    config, jobs, out = made(seed=40)
    diverge(of(jobs, "DPS", 3), out)
    records = list(csv.DictReader(io.StringIO(tables.pictures_csv(config, jobs, out))))
    assert len(records) == 3 * N
    found = {(r["row"], r["picture"]): r for r in records}
    assert found["DPS", "3.png"] | {"diverged": "NaN", "psnr": "", "seconds": "", "seed": "49"} == found["DPS", "3.png"]
    assert {k: float(r["psnr"]) for k, r in found.items() if r["psnr"]} == {
        (row, f"{i}.png"): PSNR[row][i] for row in PSNR for i in range(N) if (row, i) != ("DPS", 3)
    }


def test_published_figures(made):
    config, jobs, out = made({"DPS": {"published": {"psnr": 24.5, "seconds": 173}}, "DMAP": {"published": {"psnr": 25}}}, published_n=1000)
    records, text = written(config, jobs, out)
    head, *body = grids(text)[0]
    assert head == ["operator", "row", "n", "PSNR (dB)", "paper", "residual", "seconds", "paper", "denoiser calls"]
    assert [(cells[4], cells[7]) for cells in body] == [("", ""), ("24.5", "173"), ("25", "")]
    assert [(r["psnr_paper"], r["seconds_paper"]) for r in records] == [("", ""), ("24.5", "173"), ("25", "")]
    assert "*paper*: published figures over 1000 pictures" in text
    assert "*paper*" not in written(*made())[1]


class Colours:
    """Features (B, 4) that numpy can take, too: the mean of every channel, and their spread. Counts the pictures."""

    seen = 0

    def __call__(self, image):
        Colours.seen += len(image)
        return torch.cat([image.mean((2, 3)), image.flatten(1).std(1, keepdim=True)], dim=1)

    def to(self, device):
        return self


def numpy_colours(path):
    x = np.asarray(Image.open(path)).astype(float) / 255
    return [*x.mean((0, 1)), x.std(ddof=1)]


@pytest.fixture
def stand_in(monkeypatch):
    """Of Inception, whose weights are not here."""
    import_torchvision()
    opened = []
    monkeypatch.setattr(Colours, "seen", 0)

    def open_colours(folder):
        opened.append(folder)
        return Colours()

    for name, distance in (("fid", "frechet"), ("kid", "kernel")):
        old = SET_METRICS[name]
        new = SetMetric(name, old.label, old.better, 4 if name == "fid" else 5, "", open_colours, distance, "inception")
        monkeypatch.setitem(SET_METRICS, name, new)
    return opened


def test_distances_of_sets(made, stand_in):
    config, jobs, out = made(metrics=["psnr", "fid", "kid"])
    diverge(of(jobs, "DPS", 3), out)
    records, text = written(config, jobs, out)
    for record, cells in zip(records, grids(text)[0][1:], strict=True):
        mine = [job for job in jobs if job.row.name == record["row"] and (record["row"], job.picture.index) != ("DPS", 3)]
        real, fake = (
            np.array([numpy_colours(f) for f in files])
            for files in zip(*((j.picture.file, j.file(out).with_suffix(".png")) for j in mine), strict=True)
        )
        a, b = np.cov(real.T), np.cov(fake.T)
        fid = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
        assert float(record["fid"]) == pytest.approx(fid, rel=1e-3, abs=1e-6) and cells[4] == f"{float(record['fid']):.4f}"
        kernel = [(x @ y.T / 4 + 1) ** 3 for x, y in ((real, real), (fake, fake), (real, fake))]
        n = len(real)
        kid = sum((k.sum() - np.trace(k)) / n / (n - 1) for k in kernel[:2]) - 2 * kernel[2].mean()
        assert float(record["kid"]) == pytest.approx(kid, rel=1e-2, abs=1e-5) and cells[5] == f"{float(record['kid']):.5f}"
    assert len(stand_in) == 1  # for both distances and all rows
    assert Colours.seen == 3 * N - 1 + N + N - 1  # every restored picture once, and the originals once for those rows that have all of them
    assert f"A Frechet distance of {N} pictures" in text and "never with a paper's of another number" in text
    assert "fid" not in [cells[0] for cells in grids(text)[1]]


def test_a_published_distance_stands_only_beside_one_of_as_many_pictures(made, stand_in):
    rows = {"DPS": {"published": {"fid": 60.5}}, "DMAP": {"published": {"fid": 50}}}
    config, jobs, out = made(rows, metrics=["psnr", "fid"], published_n=1000)
    assert [cells[5] for cells in grids(written(config, jobs, out)[1])[0][1:]] == ["", *["not comparable: n is 1000 there"] * 2]
    config, jobs, out = made(rows, metrics=["psnr", "fid"])
    assert [cells[5] for cells in grids(written(config, jobs, out)[1])[0][1:]] == ["", *["not comparable: n is unknown there"] * 2]
    config, jobs, out = made(rows, metrics=["psnr", "fid"], published_n=N)
    diverge(of(jobs, "DMAP", 0), out)
    assert [cells[5] for cells in grids(written(config, jobs, out)[1])[0][1:]] == ["", "60.5", f"not comparable: n is {N} there"]


def test_one_picture_is_no_set(made, stand_in):
    config, jobs, out = made(metrics=["psnr", "fid"], count=1)
    assert [cells[4] for cells in grids(written(config, jobs, out)[1])[0][1:]] == [""] * 3


def test_names_with_signs_of_markdown_do_not_break_tables(made):
    config, jobs, out = made({"DPS": {"name": "DPS | zeta\n5"}}, title="A | B", note="of | notes\n")
    records, text = written(config, jobs, out)
    assert records[1]["row"] == "DPS | zeta\n5"
    assert [cells[1] for cells in grids(text)[0][1:]] == ["as given", "DPS / zeta 5", "DMAP"]
    assert text.startswith("# A | B\n\nof | notes\n\n|")


def test_settings_are_told(made):
    config, jobs, out = made({"DPS": {"steps": 250}}, precision="bf16", seed=7)
    text = written(config, jobs, out)[1]
    lines = {cells[1]: cells for cells in grids(text)[2][1:]}
    assert lines["DPS"][3] == "zeta 9.6, 250 steps, paper" and "scaled from 500 to 250 steps" in lines["DPS"][4]
    assert lines["as given"][3:] == ["", ""] and lines["DMAP"][0] == "Super-Resolution (scale 8)"
    assert "Seeds 7, 10 and so on, bf16." in text


def test_the_sheet(made):
    config, jobs, out = made()
    file = of(jobs, "DMAP", 1).file(out)
    file.unlink()
    file.with_suffix(".png").unlink()
    sheet = report.sheet(config, jobs, tables.read_lines(config, jobs, out), "sr8", out)
    columns, shown = 2 + 3, 4
    assert sheet.size == (columns * (SIZE + report.GAP) + report.GAP, shown * (SIZE + report.GAP) + 3 * report.TEXT)

    def tile(column, i):
        left, top = report.GAP + column * (SIZE + report.GAP), 2 * report.TEXT + i * (SIZE + report.GAP)
        return np.asarray(sheet.crop((left, top, left + SIZE, top + SIZE)))

    for i in range(shown):
        original = np.asarray(Image.open(config.images / f"{i}.png"))
        assert np.array_equal(tile(columns - 1, i), original)
        for column, solver in enumerate(PSNR, 1):
            if (solver, i) != ("DMAP", 1):
                assert np.array_equal(tile(column, i), np.asarray(Image.open(of(jobs, solver, i).file(out).with_suffix(".png"))))
        measured = tile(0, i).astype(float)
        assert np.allclose(measured[:8, :8], measured[0, 0])  # a pixel of the measurement
        assert np.abs(measured[::8, ::8] - original.reshape(2, 8, 2, 8, 3).mean((1, 3))).max() < 25
    assert (tile(3, 1) == np.array(Image.new("RGB", (1, 1), "lightgray"))).all()


def test_all_files_of_a_table(made):
    config, jobs, out = made()
    lines = report.write_table(config, jobs, out)
    assert (out / "table.md").read_text() == tables.markdown(config, jobs, lines)
    assert (out / "table.csv").read_text() == tables.table_csv(config, lines)
    assert (out / "pictures.csv").read_text() == tables.pictures_csv(config, jobs, out)
    assert Image.open(out / "pictures-sr8.png").size[0] > 5 * SIZE and not list(out.rglob("*.part"))
    assert sorted(f.name for f in (out / "plots").iterdir()) == ["psnr.png", "residual.png", "seconds.png"]
    assert all(min(Image.open(f).size) > 100 for f in (out / "plots").iterdir())


def test_labels_that_agree(made, monkeypatch):
    """mIoU is a column as any other; its figures come from the run."""
    config, jobs, out = made()
    for job in jobs:
        write(job, out, miou=0.25 + 0.1 * job.picture.index)
    object.__setattr__(config, "metrics", ("miou",))
    records, text = written(config, jobs, out)
    mean, half = interval([0.25 + 0.1 * i for i in range(N)])
    assert [cells[3] for cells in grids(text)[0][1:]] == [f"{mean:.4f} +- {half:.4f}"] * 3 and grids(text)[0][0][3] == "mIoU"
