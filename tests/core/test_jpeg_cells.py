"""Match of a JPEG: the cells of its file's coefficients, projections onto them, and operators that compress last."""

import io

import pytest
import torch
from PIL import Image
from variants import some_at_once

from dmap_core.consistency import HALF, REACHED, match, mismatch, split, towards_file
from dmap_core.operators import Compose, GaussianBlur, Grayscale, Inpainting, Jpeg, Noisy, SuperResolution, centred_box
from dmap_core.operators.jpeg import ycbcr_matrix
from dmap_core.operators.jpeg_cells import MARGIN, nearest_picture, read_file
from dmap_core.pictures import to_picture, to_tensor

LEVEL = 2 / 255
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
OWN = Jpeg(50, tables=(tuple(12 + i % 8 + i // 8 * 9 for i in range(64)), tuple(20 + i // 3 for i in range(64))))
FILES = [Jpeg(10), Jpeg(50, "4:2:2"), Jpeg(75), Jpeg(90, "4:4:4"), OWN]
every_file = pytest.mark.parametrize("f", FILES, ids=lambda f: f"{f.quality}-{f.subsampling}")
COMPOSED = [
    Compose((Grayscale(), Jpeg(30))),
    Compose((SuperResolution(2), Jpeg(50))),
    Compose((Grayscale(), Compose((GaussianBlur(5, 0.8), Jpeg(60))))),
]


def smooth(batch=1, size=(48, 64), seed=0, most=0.7):
    """Pictures with content at all scales, in [-most, most]: at 0.7 nothing is clipped."""
    noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return most * (0.3 * noise + 2 * torch.nn.functional.avg_pool2d(noise, 5, 1, 2)).tanh()


def distance(a, b):
    """In Y, Cb and Cr."""
    turned = torch.einsum("oc,bchw->bohw", ycbcr_matrix(), a - b) if a.shape[1] == 3 else a - b
    return torch.linalg.vector_norm(turned.flatten(1), dim=1)


@every_file
def test_the_original_lies_in_its_files_cells(f):
    """To within the rounding of Y, Cb and Cr to 8 bits, which a coefficient near the edge of its cell does not survive."""
    x = smooth(2, seed=1)
    moved = nearest_picture(f, x, read_file(f, f(x)), margin=0.0) - x
    assert float(moved.abs().max()) < 2 * LEVEL and float(moved.square().mean().sqrt()) < 0.15 * LEVEL


@every_file
def test_it_comes_closer_to_every_picture_of_the_file(f):
    kept = read_file(f, f(smooth(seed=1)))
    for seed in range(3):
        x = smooth(seed=10 + seed)
        found = nearest_picture(f, x, kept, margin=0.0)
        for other in range(3):
            same = nearest_picture(f, smooth(seed=20 + other), kept, margin=0.0)
            assert (distance(found, same) <= distance(x, same) * (1 + 1e-9)).all()
        torch.testing.assert_close(nearest_picture(f, found, kept, margin=0.0), found)  # a projection
        assert distance(found, x) > 1


@every_file
def test_it_compresses_to_the_same_picture(f):
    x, y = smooth(2, seed=2), f(smooth(2, seed=1))
    found = match(f, x, y)
    assert not found.short() and (found.after < found.before / 4).all()
    assert float(found.after.max()) <= LEVEL
    saved = to_tensor(to_picture(found.image[0])).unsqueeze(0)
    assert float(mismatch(f, saved, y[:1])) <= 1.5 * LEVEL


@pytest.mark.parametrize("quality, subsampling, index", [(10, "4:2:0", 2), (60, "4:4:4", 0), (85, "4:2:2", 1)])
def test_files_of_libjpeg(quality, subsampling, index):
    """Of a file that Pillow wrote, the matched picture compresses to the file again, with Pillow."""

    def compressed(picture):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, subsampling=index)
        return Image.open(file).convert("RGB")

    y = to_tensor(compressed(to_picture(smooth(seed=1)[0]))).unsqueeze(0)
    found = match(Jpeg(quality, subsampling), smooth(seed=2), y)
    again = to_tensor(compressed(to_picture(found.image[0]))).unsqueeze(0)
    assert not found.short() and float((again - y).square().mean().sqrt()) < 1.5 * LEVEL
    assert float((smooth(seed=2) - y).square().mean().sqrt()) > 20 * LEVEL


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", some_at_once([(8, 8), (3, 5), (1, 1), (37, 21), (50, 66)], [(3, 5), (37, 21)]))
def test_any_size(subsampling, size):
    f = Jpeg(40, subsampling)
    x, y = smooth(size=size, seed=2), f(smooth(size=size, seed=1))
    found = match(f, x, y)
    assert found.image.shape == x.shape and (found.after < found.before / 4).all()
    assert min(size) < 16 or not found.short()  # where a block is seen in part alone, much of it is a guess


@pytest.mark.parametrize("most", [1.0, 3.0])
def test_black_and_white(most):
    """What is clipped is guessed: nearly all of it is right."""
    f = Jpeg(30)
    truth = smooth(seed=1, most=most).clamp(-1, 1)
    y = f(truth)
    moved = nearest_picture(f, truth, read_file(f, y), margin=0.0) - truth
    plain = nearest_picture(f, truth, read_file(f, 0.7 * y), margin=0.0) - truth  # another file's
    assert float(moved.square().mean().sqrt()) < 2 * LEVEL < float(plain.square().mean().sqrt())
    x = (truth + 0.3 * smooth(seed=2)).clamp(-1, 1)
    found = match(f, x, y)
    assert float(found.after) < 4 * LEVEL and found.image.abs().max() <= 1
    assert distance(found.image, truth) < distance(x, truth)


@pytest.mark.parametrize("f", COMPOSED, ids=lambda f: f.describe()[:40])
def test_compressed_last(f):
    """No step away from any picture with that measurement (in R, G and B where luma alone is compressed), and its measurement is reached."""
    size = (64, 64)  # of which every measurement has whole blocks
    y, x = f(smooth(size=size, seed=1)), smooth(size=size, seed=2)
    before, jpeg = split(f)
    step = towards_file(before, jpeg, x, y)
    kept = read_file(jpeg, y)
    truth = smooth(size=size, seed=1)
    for _ in range(60):  # a picture that is inside of all cells
        truth = step(truth)
    assert float((nearest_picture(jpeg, before(truth), kept) - before(truth)).abs().max()) < 1e-2
    far = distance if f.channels() == 3 else lambda a, b: torch.linalg.vector_norm(a - b)
    for _ in range(20):
        nearer = step(x)
        assert far(nearer, truth) <= far(x, truth) + 1e-3
        x = nearer
    found = match(f, smooth(size=size, seed=2), y)
    assert not found.short() and (found.after < found.before / 4).all()
    assert far(found.image, smooth(size=size, seed=1)) < far(smooth(size=size, seed=2), smooth(size=size, seed=1))


def test_a_batch_is_as_many_singles():
    f = FILES[0]
    x, y = smooth(3, seed=2), f(smooth(3, seed=1))
    whole = match(f, x, y).image
    for i in range(3):
        torch.testing.assert_close(match(f, x[i : i + 1], y[i : i + 1]).image, whole[i : i + 1], rtol=0, atol=1e-9)
    assert match(f, x.float(), y.float()).image.dtype == torch.float32


def test_what_has_the_measurement_stays():
    f = Jpeg(50)
    truth = smooth(seed=1)
    assert torch.equal(match(f, truth, f(truth)).image, truth)


def test_the_gradient_chosen_for_it_does_not_matter():
    x, y = smooth(seed=2), Jpeg(50)(smooth(seed=1))
    for f, cubic in (
        (Jpeg(50), Jpeg(50, rounding="cubic")),
        (Compose((GaussianBlur(3, 0.5), Jpeg(50))), Compose((GaussianBlur(3, 0.5), Jpeg(50, rounding="cubic")))),
    ):
        a, b = match(f, x, y), match(cubic, x, y)
        assert torch.equal(a.image, b.image) and torch.equal(a.after, b.after)


def test_another_quality_is_noticed():
    """A picture that is no JPEG of that quality."""
    found = match(Jpeg(10), smooth(seed=2), smooth(seed=1))
    assert found.short() and float(found.after) > REACHED > HALF
    assert float(match(Jpeg(10), smooth(seed=2), Jpeg(10)(smooth(seed=1))).after) <= REACHED


def test_what_comes_before_is_told_apart():
    assert split(Jpeg(10)) == (None, Jpeg(10))
    assert split(COMPOSED[2]) == (Compose((Grayscale(), GaussianBlur(5, 0.8))), Jpeg(60))
    for f in (SuperResolution(2), Compose((Jpeg(10), GaussianBlur(3, 0.5))), Compose((Jpeg(10), Jpeg(20)))):
        assert split(f) is None
    assert split(Compose((Inpainting(centred_box((16, 16), (6, 6))), Jpeg(10)))) is None
    assert MARGIN < 2


def test_noise_on_top_is_refused():
    with pytest.raises(ValueError, match="operator: Known Noise .*: noise on top of a JPEG hides what its file held"):
        match(Noisy(Jpeg(20), 0.1), smooth(), smooth())
