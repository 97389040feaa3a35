"""From what a person says of a photo, and what is measured of it, to a measurement and its operator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .estimate import IDENTITY, Estimate, estimate, is_grey
from .operators import Compose, GaussianBlur, Grayscale, Inpainting, Jpeg, MotionBlur, Noisy, Operator, SuperResolution
from .operators.base import Size, real, size_of, whole
from .operators.colour import luma
from .operators.noisy import parts

AUTO, CUSTOM = "auto", "custom"
# What each kind of damage is looked for in the photo; what a person says counts for all of them.
LOOKS_FOR = {
    AUTO: frozenset({"blur", "grain", "jpeg", "size", "enlarged"}),
    "too small": frozenset({"size"}),
    "soft": frozenset({"blur"}),
    "shaken": frozenset(),
    "scratched": frozenset(),
    "grainy": frozenset({"grain"}),
    "JPEG": frozenset({"jpeg"}),
    "old photo": frozenset({"blur", "grain", "size"}),
    CUSTOM: frozenset(),
}
ENLARGE = (AUTO, "1", "2", "4", "8")
COLOURS = ("keep", "colourise")
# Assumed where a person says that there is a damage, and nothing of it is found in the photo: pixels, grey levels, libjpeg's scale.
SOFTNESS, SHAKE, GRAIN, QUALITY = 2.0, 15.0, 8.0, 50
SHARP = 0.1  # sigma in pixels of a blur that is none: its kernel is a single 1
LEAST = 32  # pixels of a result's side, which networks halve again and again


@dataclass(frozen=True)
class Said:
    """What a person says of a photo. 0 is "I do not know" for all numbers.

    damage: a key of LOOKS_FOR. enlarge: of ENLARGE. softness: sigma in pixels of the photo, of a shaken one the length of the streaks. angle: of these, in degrees as MotionBlur has it.
    grain: standard deviation in grey levels of 255. jpeg_quality: libjpeg's, 1 .. 100. colours: of COLOURS. Raises ValueError for anything else.
    """

    damage: str = AUTO
    enlarge: str = AUTO
    softness: float = 0.0
    angle: float = 0.0
    grain: float = 0.0
    jpeg_quality: int = 0
    colours: str = COLOURS[0]

    def __post_init__(self):
        for name, known in (("damage", tuple(LOOKS_FOR)), ("enlarge", ENLARGE), ("colours", COLOURS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        for name, most in (("softness", 255.0), ("grain", 127.0)):
            real(name, getattr(self, name) or 1e-9, most)
        whole("jpeg_quality", self.jpeg_quality, 0, 100)


@dataclass(frozen=True)
class Case:
    """A problem to solve. measurement: (1, 3, h, w) in [-1, 1]. operator: None where nothing is damaged. size: (H, W) that the result is meant to have.

    grey: whether the result has to be, as the photo is. notes: what was seen and assumed, sentences for people.
    """

    measurement: Tensor
    operator: Operator | None
    size: Size
    grey: bool
    notes: tuple[str, ...]


def case_of(photo: Tensor, said: Said, mask: Tensor | None = None, given: Operator | None = None, native: int = 512) -> Case:
    """The case of a photo (1, 3, H, W) in [-1, 1].

    mask: (H, W), 1 where it is missing. given: an operator that is known, that of damage "custom"; for the others it counts if it is the Jpeg of the photo's file.
    native: pixels of a side of the pictures that the model knows, up to which a small photo is enlarged. Raises ValueError for what is contradictory or too small.
    """
    if said.damage == CUSTOM:
        return _custom(photo, said, mask, given)
    if said.damage == "scratched" and mask is None:
        raise ValueError(
            "mask: damage is scratched, and nothing is painted. Open the photo in the mask editor, paint over the scratches, and connect mask"
        )
    looks = LOOKS_FOR[said.damage]
    found = _seen(photo, said, given if isinstance(given, Jpeg) else None)
    notes: list[str] = []
    measurement, again = photo, 1
    beneath = said.damage == "JPEG" and found.beneath  # what was compressed is the smaller picture
    if ("enlarged" in looks or beneath) and found.scale > 1 and said.enlarge in (AUTO, "1") and mask is None:
        measurement, again = found.measurement(photo), found.scale
        notes.append(f"the photo had been enlarged {found.enlarged:.3g} times: it is made {again} times smaller first")
    blur = said.softness or _measured(found, "blur", said, notes)
    grain = said.grain / 255 or _measured(found, "grain", said, notes)
    if said.damage == AUTO and not said.grain:
        grain = found.noise()  # with what a compression took that is not modelled
    jpeg = _jpeg(found, said, looks, notes) if again > 1 or not found.beneath or said.jpeg_quality else None
    scale = again if again > 1 else _scale(said, size_of(measurement), native, "size" in looks, said.damage == "too small")
    chain: list[Operator] = [Grayscale()] if said.colours == "colourise" else []
    if said.damage == "shaken":
        chain.append(_motion(said, scale, notes))
    elif blur:
        chain.append(gaussian(blur * scale))
    if scale > 1:
        chain.append(SuperResolution(scale))
    if jpeg is not None:
        chain.append(jpeg)
    if mask is not None:
        chain.append(Inpainting(mask))
    if said.colours == "colourise" and not found.grey:
        notes.append("the photo has colours, which colourise replaces: set colours to keep if they are right")
    height, width = size_of(photo)
    larger = scale // again
    size = height * larger, width * larger
    _check_size(size)
    if said.damage == AUTO:
        notes = [found.text().splitlines()[0].rstrip("."), *notes, *found.notes]
        if not chain and not grain:
            unknown = [word for word, value in (("soft", found.blur), ("grainy", found.grain)) if value is None]
            if unknown:
                notes.append(
                    f"whether it is {' or '.join(unknown)} cannot be told from this photo: if you see that it is, choose that damage"
                )
            return Case(photo, None, size_of(photo), found.grey, tuple(notes))
    operator = _of(chain or [IDENTITY])
    grey = found.grey and said.colours == "keep"
    if grain:
        operator = Noisy(operator, grain)
        if (
            grey and not said.grain and not bool((measurement == measurement[:, :1]).all())
        ):  # luma's grain was measured, of which colours have more
            measurement = luma(measurement).clamp(-1, 1).expand(-1, 3, -1, -1)
            notes.append("the photo is grey, and its grain has colours, which are left out")
    return Case(measurement, operator, size, grey, tuple(notes))


def _seen(photo: Tensor, said: Said, jpeg: Jpeg | None) -> Estimate:
    """What is in the photo, as far as it counts: of a damage that is not looked for, or of which a number is given, nothing is measured but whether it is grey."""
    given = {name for name, value in (("blur", said.softness), ("grain", said.grain)) if value}
    if LOOKS_FOR[said.damage] - given <= {"size"}:
        return Estimate(size=size_of(photo), grey=is_grey(photo), blur=None, grain=None)
    return estimate(photo, jpeg)


def gaussian(sigma: float) -> GaussianBlur:
    """A Gaussian blur of that many pixels, whole up to four of them."""
    return GaussianBlur(kernel_size=min(2 * max(1, round(4 * sigma)) + 1, 511), sigma=max(sigma, SHARP))


def _of(chain: list[Operator]) -> Operator:
    return chain[0] if len(chain) == 1 else Compose(tuple(chain))


def _custom(photo: Tensor, said: Said, mask: Tensor | None, given: Operator | None) -> Case:
    if given is None:
        raise ValueError("operator: damage is custom, and no operator is connected; connect one, or choose another damage")
    noise, operator = (given.sigma, given.operator) if isinstance(given, Noisy) else (0.0, given)
    if mask is not None and not any(isinstance(f, Inpainting) for f in parts(operator)):
        operator = Compose((*(operator.parts or (operator,)), Inpainting(mask)))
    size = operator.image_size(photo)
    _check_size(size)
    grey = said.colours == "keep" and operator.channels() == 3 and is_grey(photo)
    return Case(photo, Noisy(operator, noise) if noise else operator, size, grey, ())


def _measured(found: Estimate, name: str, said: Said, notes: list[str]) -> float:
    """What was measured of blur (pixels) or grain (0..1); where it is what the person named and was not found, what is usual. 0 where it is not looked for."""
    if name not in LOOKS_FOR[said.damage]:
        return 0.0
    value, (word, usual, unit) = getattr(found, name), {"blur": ("softness", SOFTNESS, 1), "grain": ("grain", GRAIN, 255)}[name]
    pixels = "pixels" if unit == 1 else "grey levels"
    if value:
        notes.append(f"{word}: {value * unit:.1f} {pixels}, measured")
        return value
    if said.damage in ("soft", "grainy"):
        notes.append(f"{word} could not be measured: {usual:g} {pixels} assumed. If the result is not right, set it")
        return usual / unit
    if value is None and said.damage != AUTO:  # whose notes say it
        notes.append(f"{word} cannot be measured in this photo, and none is assumed: if you see it, set {word} (often {usual:g} {pixels})")
    return 0.0


def _jpeg(found: Estimate, said: Said, looks: frozenset[str], notes: list[str]) -> Jpeg | None:
    if said.jpeg_quality:
        return Jpeg(said.jpeg_quality)
    if "jpeg" not in looks:
        return None
    if said.damage == AUTO:
        return found.compressed()
    if found.jpeg is None:
        notes.append(f"no traces of JPEG were found: quality {QUALITY} assumed. If the result is not right, set jpeg_quality")
    return found.jpeg or Jpeg(QUALITY)


def _motion(said: Said, scale: int, notes: list[str]) -> MotionBlur:
    if not said.softness:
        notes.append(
            f"streaks of {SHAKE:g} pixels at {said.angle:g} degrees are assumed: set softness to their length, and shake_angle to their direction"
        )
    return MotionBlur(max((said.softness or SHAKE) * scale, 1.1), said.angle)


def _scale(said: Said, size: Size, native: int, looked_for: bool, meant: bool) -> int:
    """How many times smaller the measurement is than what is restored."""
    if said.enlarge != AUTO:
        return int(said.enlarge)
    if not looked_for:
        return 1
    fits = [n for n in (1, 2, 4, 8) if max(size) * n <= 1.25 * native]
    return max([*fits, 2 if meant else 1])


def _check_size(size: Size) -> None:
    if min(size) < LEAST:
        raise ValueError(
            f"image: the result would be {size[1]}x{size[0]}; it must be {LEAST} pixels wide and high at least: enlarge it more"
        )
