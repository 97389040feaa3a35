"""tools/thumbnails.py, and the thumbnails that lie beside the workflows."""

import subprocess
import sys
from pathlib import Path

from host import PACK, ROOT, Host
from PIL import Image

NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
RED, GREEN = (255, 0, 0), (0, 255, 0)


def thumbnails(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "thumbnails.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)


def close(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(abs(x - y) < 20 for x, y in zip(a, b, strict=True))  # JPEG is not exact


def test_degraded_on_the_left_and_restored_on_the_right(tmp_path: Path):
    plots = ("-all-solvers", "-cse", "-metrics", "-observations", "-steps-and-solvers", "-toy")
    pairs = [name for name in NAMES if not name.endswith(plots)]
    numbered = {"1": "old-photo", "2": "inpainting", "3": "super-resolution-x8", "4": "gaussian-deblur", "5": "super-resolution-x4"}
    for kind in {numbered.get(name[0]) or name.partition("-")[2] for name in pairs}:
        folder = tmp_path / "results" / kind
        folder.mkdir(parents=True)
        Image.new("RGB", (16, 16), RED).save(folder / "some-degraded.png")
        Image.new("RGB", (128, 128), GREEN).save(folder / "some-DMAP.png")
    done = thumbnails("--results", tmp_path / "results", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.jpg" for name in NAMES]
    for name in pairs:
        picture = Image.open(tmp_path / "out" / f"{name}.jpg")
        width, height = picture.size
        assert width == height
        assert close(picture.getpixel((width // 4, height // 2)), RED)
        assert close(picture.getpixel((3 * width // 4, height // 2)), GREEN)
        assert close(picture.getpixel((width // 2, height // 2)), (255, 255, 255))
        labelled = not close(picture.getpixel((width - 3, height - 3)), GREEN)
        assert labelled == (name.startswith("sd2-") or name.endswith("-sd"))  # made with the demo prior, not with Stable Diffusion


def test_missing_pictures_are_named_and_nothing_is_written(tmp_path: Path):
    done = thumbnails("--results", tmp_path / "results", "--out", tmp_path / "out")
    assert done.returncode != 0
    assert "demo/run.py" in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_shipped_thumbnails_are_small_and_belong_to_a_workflow(host: Host):
    for path in (ROOT / "workflows").glob("*.jpg"):
        assert path.stem in NAMES
        assert path.stat().st_size < 40_000
        assert Image.open(path).format == "JPEG"
    assert sorted(host.get("/api/workflow_templates")[PACK]) == NAMES
