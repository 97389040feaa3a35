"""Natural photographs for a table: the colour pictures that scikit-image and scikit-learn ship, 128 pixels wide.

    python demo/photographs.py    # writes demo/cache/photographs/*.png, as `demo/compare.py --photographs` does

The demo prior has seen none of their kind: they show what a restoration of a picture that the model does not know is worth.
"""

from importlib.resources import as_file, files
from pathlib import Path

from dmap_core.pictures import centred, open_rgb

HERE = Path(__file__).resolve().parent
SIDE = 128
PHOTOGRAPHS = {
    "skimage/data": ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}  # fmt: skip


def prepare(folder: Path = HERE / "cache" / "photographs") -> Path:
    """The folder of the pictures: the middle square of each, resized to SIDE (Lanczos). Raises SystemExit where a package is not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, names in PHOTOGRAPHS.items():
        package, *inside = place.split("/")
        for name in names:
            target = folder / Path(name).with_suffix(".png").name
            if target.exists():
                continue
            try:
                source = files(package).joinpath(*inside, name)
            except ModuleNotFoundError as error:
                raise SystemExit(f"{package} is not installed, whose pictures are wanted; pip install .[test]") from error
            with as_file(source) as file:
                centred(open_rgb(file), SIDE).save(target)
    return folder


if __name__ == "__main__":
    print(prepare())
