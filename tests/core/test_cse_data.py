"""Training examples: what augmentation does, and that an example depends on the seed and its number alone."""

import colorsys
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from dmap_core.cse import data
from dmap_core.cse.data import Examples, augmented, collate
from dmap_core.cse.settings import TrainingSettings
from dmap_core.pictures import PictureError, folder_files

PLAIN = {"resize": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}


def random_picture(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rng(seed=0):
    return np.random.default_rng(seed)


def settings(**changed):
    return TrainingSettings(**{"steps": 10, "batch_size": 2, "size": 32, **changed})


# ---- augmentation


def test_a_crop_has_its_size_whatever_the_picture():
    for i in range(60):
        random = rng(i)
        picture = random_picture(*(int(n) for n in random.integers(1, 70, 2)), seed=i)
        found = augmented(picture, settings(size=24, resize=(0.1, 3.0), flip=0.5), random)
        assert found.size == (24, 24) and found.mode == "RGB"


def test_a_crop_is_a_part_of_the_picture():
    picture = random_picture(14, 20)
    pixels, places = np.array(picture), set()
    for i in range(200):
        found = np.array(data._crop(picture, 12, rng(i)))
        place = [(t, left) for t in range(9) for left in range(3) if np.array_equal(found, pixels[t : t + 12, left : left + 12])]
        assert len(place) == 1
        places.add(place[0])
    assert len(places) == 27


def reflected(i, n):
    """The pixel that a mirror at both edges shows at place i of a row of n."""
    i %= 2 * n
    return i if i < n else 2 * n - 1 - i


@pytest.mark.parametrize(("width", "height"), [(10, 7), (10, 30), (3, 2)])
def test_a_picture_smaller_than_the_crop_is_mirrored_at_its_edges(width, height):
    picture, size = random_picture(width, height), 12
    pixels, places = np.array(picture), set()
    for i in range(100):
        found = np.array(data._crop(picture, size, rng(i)))
        assert found.shape == (size, size, 3)
        shifts = [range(size - n + 1) if n < size else range(size - n, 1) for n in (height, width)]
        fits = [
            (top, left)
            for top in shifts[0]
            for left in shifts[1]
            if np.array_equal(
                found, pixels[np.ix_([reflected(y - top, height) for y in range(size)], [reflected(x - left, width) for x in range(size)])]
            )
        ]
        assert len(fits) >= 1
        places.update(fits)
    assert len(places) > 10


def test_the_resize_range():
    """A ramp from left to right: its slope in the crop tells the scale."""
    ramp = Image.fromarray(np.repeat(np.tile(np.linspace(0, 255, 256).round().astype(np.uint8), (256, 1))[..., None], 3, 2))
    scales = []
    for i in range(150):
        crop = np.array(augmented(ramp, settings(size=64, resize=(0.8, 2.0), flip=0.0, jitter=0.0), rng(i)))
        slope = np.abs(np.diff(crop[32, :, 0].astype(float))).mean()  # 0 at the seams of a mirrored edge, which are two at most
        scales.append(255 / 64 / slope)
    assert 0.78 < min(scales) < 0.88 and 1.9 < max(scales) < 2.05
    assert np.mean(scales) == pytest.approx(1.4, abs=0.1)


def test_the_resize_is_of_the_shorter_side():
    picture = random_picture(60, 20)
    assert data._scaled(picture, 1.0, 32).size == (96, 32)
    assert data._scaled(picture, 0.5, 32).size == (48, 16)
    assert data._scaled(random_picture(20, 60), 2.0, 32).size == (64, 192)
    assert data._scaled(random_picture(3000, 1), 0.1, 1).size[1] == 1


@pytest.mark.parametrize("flip", [0.0, 0.5, 0.2, 1.0])
def test_flips(flip):
    picture = random_picture(32, 32)
    pixels = np.array(picture)
    flipped = 0
    for i in range(300):
        found = np.array(augmented(picture, settings(**{**PLAIN, "flip": flip}), rng(i)))
        is_flipped = np.array_equal(found, pixels[:, ::-1])
        assert is_flipped or np.array_equal(found, pixels)
        flipped += is_flipped
    assert abs(flipped - 300 * flip) <= 4 * (300 * flip * (1 - flip)) ** 0.5


def test_without_jitter_colours_stay():
    colour = (200, 40, 90)
    for i in range(20):
        found = augmented(Image.new("RGB", (50, 37), colour), settings(jitter=0.0), rng(i))
        assert found.getcolors() == [(32 * 32, colour)]


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_jitter_of_grey_is_brightness_within_bounds(strength):
    """Contrast, saturation and hue do nothing to a picture of one grey."""
    found = [data._jittered(Image.new("RGB", (4, 4), (100, 100, 100)), strength, rng(i)).getpixel((1, 1)) for i in range(200)]
    values = np.array(found)
    assert np.ptp(values, axis=1).max() == 0
    assert 100 * (1 - strength) - 2 <= values.min() < 100 * (1 - 0.8 * strength)
    assert 100 * (1 + 0.8 * strength) < values.max() <= 100 * (1 + strength) + 2


def test_jitter_of_a_colour_stays_within_bounds():
    """Hue turns by at most the strength; the other three multiply distances between channels by 1 - strength to 1 + strength each."""
    strength, colour = 0.1, (150, 80, 80)
    hues, chromas = [], []
    for i in range(300):
        r, g, b = data._jittered(Image.new("RGB", (4, 4), colour), strength, rng(i)).getpixel((1, 1))
        hue = colorsys.rgb_to_hsv(r, g, b)[0]
        hues.append(hue - (hue > 0.5))
        chromas.append((max(r, g, b) - min(r, g, b)) / 70)
    assert -strength - 0.02 <= min(hues) < -0.08 and 0.08 < max(hues) <= strength + 0.02
    assert 0.9**3 - 0.05 <= min(chromas) < 0.9 and 1.1 < max(chromas) <= 1.1**3 + 0.05


def test_jitter_is_small_and_random():
    picture = random_picture(32, 32)
    found = [np.array(data._jittered(picture, 0.02, rng(i))).astype(int) for i in range(5)]
    assert all(np.abs(a - np.array(picture)).mean() < 8 for a in found)
    assert all(not np.array_equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert all(len(np.unique(a - np.array(picture))) > 1 for a in found)


# ---- examples


def colours(n):
    return [Image.new("RGB", (20, 20), (40 * i, 255 - 40 * i, 7)) for i in range(n)]


def test_example_k_depends_on_the_seed_and_k_alone():
    pictures = [random_picture(50, 40, i) for i in range(5)]
    a, b = (Examples(pictures, settings(seed=3), 1000) for _ in range(2))
    assert len(a) == 20
    forwards, backwards = {k: a[k] for k in range(20)}, {k: b[k] for k in (7, *reversed(range(20)))}
    longer = Examples(pictures, settings(seed=3, steps=100, batch_size=4), 1000)
    for k in range(20):
        for other in (backwards[k], longer[k], a[k]):
            assert torch.equal(forwards[k]["image"], other["image"])
            assert all(forwards[k][name] == other[name] for name in ("timestep", "noise_seed", "measurement_seed"))
    other = Examples(pictures, settings(seed=4), 1000)
    assert all(other[k]["noise_seed"] != forwards[k]["noise_seed"] for k in range(20))


def test_the_numbers_of_examples():
    examples = Examples(colours(3), settings(steps=300, size=8, jitter=0.0), 1000)
    found = [examples[k] for k in range(600)]
    timesteps = np.array([e["timestep"] for e in found])
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    assert np.mean(timesteps) == pytest.approx(499.5, abs=4 * 1000 / 12**0.5 / 600**0.5)
    assert timesteps.min() < 50 and timesteps.max() > 950
    seeds = [e[name] for e in found for name in ("noise_seed", "measurement_seed")]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**62
    assert {Examples(colours(2), settings(), 1)[k]["timestep"] for k in range(8)} == {0}


def test_every_picture_comes_once_an_epoch():
    pictures = colours(6)
    examples = Examples(pictures, settings(steps=50, jitter=0.0), 10)
    red = [round((float(examples[k]["image"][0, 0, 0]) + 1) * 127.5 / 40) for k in range(60)]
    epochs = [red[i : i + 6] for i in range(0, 60, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5


def test_through_a_loader_with_processes(tmp_path):
    for i in range(4):
        random_picture(40, 30, i).save(tmp_path / f"{i}.png")
    files, _ = folder_files(tmp_path)
    chosen = settings(steps=4, seed=11)
    alone = Examples(files, chosen, 1000)
    loader = DataLoader(Subset(Examples(files, chosen, 1000), range(2, 8)), 2, collate_fn=collate, num_workers=2)
    batches = list(loader)
    assert len(batches) == 3
    for n, batch in enumerate(batches):
        examples = [alone[2 + 2 * n], alone[3 + 2 * n]]
        assert torch.equal(batch["image"], torch.stack([e["image"] for e in examples]))
        assert batch["image"].shape == (2, 3, 32, 32) and batch["image"].min() >= -1 and batch["image"].max() <= 1
        assert batch["timestep"].dtype == torch.int64 and batch["timestep"].tolist() == [e["timestep"] for e in examples]
        assert batch["noise_seeds"] == [e["noise_seed"] for e in examples]
        assert batch["measurement_seeds"] == [e["measurement_seed"] for e in examples]


def test_examples_travel_to_other_processes(tmp_path):
    random_picture().save(tmp_path / "a.png")
    examples = Examples([tmp_path / "a.png"] * 2, settings(), 1000)
    wanted = examples[3]
    found = pickle.loads(pickle.dumps(examples))[3]
    assert torch.equal(found["image"], wanted["image"]) and found["noise_seed"] == wanted["noise_seed"]


def test_pictures_in_memory_are_like_files(tmp_path):
    pictures = [random_picture(50, 40, i) for i in range(3)]
    files = []
    for i, picture in enumerate(pictures):
        files.append(tmp_path / f"{i}.png")
        picture.save(files[-1])
    a, b = Examples(pictures, settings(), 1000), Examples(files, settings(), 1000)
    assert all(torch.equal(a[k]["image"], b[k]["image"]) for k in range(6))
    assert np.array_equal(np.array(pictures[0]), np.array(random_picture(50, 40, 0)))  # not changed in place


@pytest.mark.parametrize("n", [0, 4])
def test_fewer_pictures_than_a_batch(n):
    with pytest.raises(PictureError, match=rf"there are {n}, fewer than batch_size 5\b"):
        Examples(colours(n), settings(batch_size=5), 1000)
    assert len(Examples(colours(5), settings(batch_size=5), 1000)) == 50
