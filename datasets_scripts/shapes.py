"""Generated scenes with exact masks: five classes told apart by outline and pattern, never by colour.

python -m datasets_scripts.shapes --output data/shapes
python -m datasets_scripts.shapes --output data/shapes --train 480 --validation 80 --size 96 --seed 0

Every object has a patterned body and a part 1 to 3 pixels thin (at 96 pixels). Its two tones and the colours
of the background come from one distribution, whatever the class. A scene depends on seed, split, size and
index alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw

from modeling_msee.data.examples import Example, Split, encode_png
from modeling_msee.data.writer import Summary, check_output, write_dataset

from .common import Mask, command_parser, mask_labels, run_command


Array = NDArray[np.float64]
Box = tuple[float, float, float, float]
Pattern = Callable[[Array, Array], NDArray[np.bool_]]

SPLITS = ("train", "validation")
SUPERSAMPLING = 4
SMALLEST, LARGEST = 0.22, 0.80  # side of an object as a share of the shorter image side
NO_OBJECT = 0.04  # share of scenes
OBJECT_COUNTS = (0.4, 0.4, 0.2)  # probabilities of 1, 2 and 3 objects
SAME_CLASS = 0.1  # probability that a further object repeats a class of the scene
MAX_OVERLAP = 0.1  # of the smaller bounding box
PLACEMENT_TRIALS = 60


@dataclass(frozen=True)
class Shape:
    """Outline in a square of side 2 around (0, 0), y down: filled polygons, thin lines, body pattern."""

    name: str
    body: tuple[Array, ...]
    thin: tuple[Array, ...]
    pattern: Pattern


def _points(*pairs: tuple[float, float]) -> Array:
    return np.array(pairs, dtype=np.float64)


def _arc(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0) -> Array:
    """Points of an elliptic arc, angles in degrees, clockwise on the screen from the right."""
    angle = np.radians(np.linspace(start, stop, 40))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


# Patterns, in pixels of a scene of 96: as real textures, they do not grow with the object.


def _horizontal_stripes(x: Array, y: Array) -> NDArray[np.bool_]:
    return np.floor(y / 3.2) % 2 == 0


def _vertical_stripes(x: Array, y: Array) -> NDArray[np.bool_]:
    return np.floor(x / 3.2) % 2 == 0


def _diagonal_stripes(x: Array, y: Array) -> NDArray[np.bool_]:
    return np.floor((x + y) / 4.5) % 2 == 0


def _checks(x: Array, y: Array) -> NDArray[np.bool_]:
    return (np.floor(x / 4) + np.floor(y / 4)) % 2 == 0


def _dots(x: Array, y: Array) -> NDArray[np.bool_]:
    row = np.floor(y / 6)
    u = (x / 7 + 0.5 * (row % 2)) % 1 - 0.5
    v = (y / 6) % 1 - 0.5
    return (7 * u) ** 2 + (6 * v) ** 2 < 2.2**2


def _wave(start: tuple[float, float], length: float, amplitude: float) -> Array:
    t = np.linspace(0, 1, 30)
    return np.stack([start[0] + amplitude * np.sin(4 * np.pi * t), start[1] + length * t], axis=1)


SHAPES: tuple[Shape, ...] = (
    Shape(
        "boat",
        body=(_points((-1, 0.2), (1, 0.2), (0.6, 0.85), (-0.6, 0.85)),),
        thin=(_points((0, 0.2), (0, -1)), _points((0, -1), (0.6, -0.15), (0, -0.15))),
        pattern=_horizontal_stripes,
    ),
    Shape(
        "dog",
        body=(
            _arc(-0.1, 0.0, 0.68, 0.34),
            _arc(0.66, -0.4, 0.32, 0.27),
            _points((0.42, -0.5), (0.46, -0.9), (0.68, -0.6)),
        ),
        thin=(
            _points((-0.55, 0.15), (-0.6, 0.9)),
            _points((-0.35, 0.2), (-0.32, 0.9)),
            _points((0.15, 0.2), (0.12, 0.9)),
            _points((0.35, 0.15), (0.42, 0.9)),
            _points((-0.7, -0.1), (-0.92, -0.4), (-0.95, -0.75)),
        ),
        pattern=_dots,
    ),
    Shape(
        "kite",
        body=(_points((0, -1), (0.6, -0.35), (0, 0.4), (-0.6, -0.35)),),
        thin=(_wave((0, 0.38), 0.62, 0.16),),
        pattern=_checks,
    ),
    Shape(
        "tree",
        body=(_arc(0, -0.45, 0.5, 0.55), _arc(-0.4, -0.2, 0.34, 0.34), _arc(0.4, -0.2, 0.34, 0.34)),
        thin=(_points((0, 0), (0, 1)), _points((0, 0.55), (0.3, 0.1)), _points((-0.2, 1), (0.2, 1))),
        pattern=_vertical_stripes,
    ),
    Shape(
        "umbrella",
        body=(_arc(0, 0.05, 1, 0.9, 180, 360),),
        thin=(np.concatenate([_points((0, 0.05), (0, 0.75)), _arc(0.18, 0.78, 0.18, 0.2, 180, 0)]),),
        pattern=_diagonal_stripes,
    ),
)
CLASS_NAMES: tuple[str, ...] = tuple(shape.name for shape in SHAPES)


@dataclass(frozen=True)
class Placed:
    """A shape put into a scene: `scale` pixels a unit, mirrored if `mirror` is -1, then turned by `angle`."""

    shape: Shape
    x: float
    y: float
    scale: float
    angle: float
    mirror: float

    def to_pixels(self, points: Array) -> Array:
        """(N, 2) unit coordinates to (N, 2) pixel coordinates."""
        return (points * (self.mirror, 1.0)) @ _rotation(self.angle).T * self.scale + (self.x, self.y)

    def to_unit(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Pixel coordinates back to unit coordinates."""
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        u, v = (x - self.x) / self.scale, (y - self.y) / self.scale
        return (cosine * u + sine * v) * self.mirror, cosine * v - sine * u


def _rotation(angle: float) -> Array:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _random_colour(rng: np.random.Generator) -> Array:
    """The one distribution that the mean colour of objects and of backgrounds comes from; (3,) in [0, 1]."""
    return rng.uniform(0.25, 0.75, size=3)


def _random_tones(rng: np.random.Generator) -> Array:
    """(2, 3): a light and a dark tone, in random order, around a random mean colour."""
    step = rng.uniform(0.2, 0.25) + rng.uniform(-0.05, 0.05, size=3)
    return _random_colour(rng) + np.outer((1, -1) if rng.random() < 0.5 else (-1, 1), step)


# --- Layout ---------------------------------------------------------------------------------------


def _random_classes(rng: np.random.Generator) -> list[int]:
    if rng.random() < NO_OBJECT:
        return []
    order = list(rng.permutation(len(SHAPES)))[: rng.choice(len(OBJECT_COUNTS), p=OBJECT_COUNTS) + 1]
    return [int(order[0] if rng.random() < SAME_CLASS else index) for index in order]


def _place(rng: np.random.Generator, shape: Shape, height: int, width: int) -> tuple[Placed, Box]:
    """A shape of random size at a random position inside the image, and its bounding box (x0, y0, x1, y1)."""
    side = min(height, width) * rng.uniform(SMALLEST, LARGEST)
    angle, mirror = rng.uniform(-0.2, 0.2), float(rng.choice((-1.0, 1.0)))
    outline = np.concatenate([*shape.body, *shape.thin])
    turned = Placed(shape, 0.0, 0.0, 1.0, angle, mirror).to_pixels(outline)
    low, high = turned.min(axis=0), turned.max(axis=0)
    scale = side / float((high - low).max())
    corner = rng.uniform(0.0, 1.0, size=2) * ((width, height) - (high - low) * scale)
    x, y = corner - low * scale
    (left, top), (right, bottom) = corner.tolist(), (corner + (high - low) * scale).tolist()
    return Placed(shape, float(x), float(y), scale, angle, mirror), (left, top, right, bottom)


def _overlap(first: Box, second: Box) -> float:
    """Intersection of two boxes as a share of the smaller one."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return max(width, 0.0) * max(height, 0.0) / smaller


def _layout(rng: np.random.Generator, height: int, width: int) -> list[tuple[int, Placed, Box]]:
    """Classes, positions and boxes of a scene's objects; one that finds no free place is left out."""
    placed: list[tuple[int, Placed, Box]] = []
    for index in _random_classes(rng):
        for _ in range(PLACEMENT_TRIALS):
            candidate, box = _place(rng, SHAPES[index], height, width)
            if all(_overlap(box, other) <= MAX_OVERLAP for _, _, other in placed):
                placed.append((index, candidate, box))
                break
    return placed


# --- Drawing --------------------------------------------------------------------------------------


def _smooth(rng: np.random.Generator, height: int, width: int, cells: int) -> Array:
    """(H, W) smooth random field, about -1 to 1, with `cells` values along each side."""
    coarse = rng.uniform(-1, 1, size=(cells, cells)).astype(np.float32)
    return np.asarray(
        PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BICUBIC), dtype=np.float64
    )


def _background(rng: np.random.Generator, height: int, width: int) -> Array:
    """(H, W, 3) gradient between two random colours, with faint clouds, plain blobs and lines."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)[..., None]
    picture = (1 - ramp) * _random_colour(rng) + ramp * _random_colour(rng)
    picture += 0.05 * _smooth(rng, height, width, 4)[..., None] + 0.04 * _smooth(rng, height, width, 12)[..., None]
    canvas = PILImage.new("L", (width, height), 0)
    for _ in range(rng.integers(2, 6)):
        canvas.paste(0, (0, 0, width, height))
        _draw_distractor(rng, ImageDraw.Draw(canvas), height, width)
        picture += np.asarray(canvas)[..., None] / 255 * rng.uniform(0.05, 0.12) * rng.choice((-1, 1))
    return picture


def _draw_distractor(rng: np.random.Generator, draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    if rng.random() < 0.5:
        rx, ry = rng.uniform(0.05, 0.25, size=2) * min(height, width)
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
    else:
        dx, dy = rng.uniform(-0.6, 0.6, size=2) * min(height, width)
        draw.line((x, y, x + dx, y + dy), fill=255, width=max(1, round(0.02 * min(height, width))))


def _coverage(
    polygons: Sequence[Array], height: int, width: int, line_width: float | None = None
) -> NDArray[np.bool_]:
    """(4H, 4W) pixels covered by filled polygons, or by open lines of `line_width` image pixels."""
    canvas = PILImage.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING), 0)
    draw = ImageDraw.Draw(canvas)
    for points in polygons:
        corners = [(float(x), float(y)) for x, y in points * SUPERSAMPLING]
        if line_width is None:
            draw.polygon(corners, fill=255)
        else:
            draw.line(corners, fill=255, width=round(line_width * SUPERSAMPLING), joint="curve")
    return np.asarray(canvas) > 0


def _average(fine: Array, height: int, width: int) -> Array:
    """(4H, 4W, ...) to the (H, W, ...) means of its 4x4 blocks."""
    return fine.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, *fine.shape[2:]).mean(axis=(1, 3))


def _draw_object(
    rng: np.random.Generator, picture: Array, placed: Placed, line_width: float, pixel: float
) -> NDArray[np.bool_]:
    """Draw onto the (H, W, 3) picture in place; returns the (H, W) pixels that are at least half covered.

    Lines are `line_width` pixels wide; `pixel` is the size of a pixel of a scene of 96.
    """
    height, width = picture.shape[:2]
    body = _coverage([placed.to_pixels(points) for points in placed.shape.body], height, width)
    thin = _coverage([placed.to_pixels(points) for points in placed.shape.thin], height, width, line_width) & ~body
    y, x = (np.mgrid[0 : body.shape[0], 0 : body.shape[1]] + 0.5) / SUPERSAMPLING
    tones = _random_tones(rng)
    covered = _average((body | thin).astype(np.float64), height, width)
    behind = picture[covered >= 0.5].mean(axis=0)
    farther = tones[int(np.abs(tones - behind).sum(axis=1).argmax())]  # else a thin part could vanish
    pattern = placed.shape.pattern(*(axis * placed.scale / pixel for axis in placed.to_unit(x, y)))
    colour = np.where(body[..., None], tones[pattern.astype(np.int64)], farther) * (body | thin)[..., None]
    picture *= 1 - covered[..., None]
    picture += _average(colour, height, width)
    return covered >= 0.5


def draw_scene(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.uint8], Mask]:
    """A random scene: (H, W, 3) picture and (H, W) mask of 0 (background) and class index + 1."""
    layout = _layout(rng, height, width)
    pixel = min(height, width) / 96
    picture = _background(rng, height, width)
    mask = np.zeros((height, width), dtype=np.uint8)
    for index, placed, box in layout:
        line_width = float(np.clip(0.07 * placed.scale, 1.25, 3.0) * max(pixel, 1.0))
        left, top = (max(int(low - line_width), 0) for low in box[:2])
        window = np.s_[top : int(box[3] + line_width) + 1, left : int(box[2] + line_width) + 1]
        moved = replace(placed, x=placed.x - left, y=placed.y - top)
        mask[window][_draw_object(rng, picture[window], moved, line_width, pixel)] = index + 1
    picture += rng.normal(0, 0.015, size=picture.shape)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8), mask


# --- Data set -------------------------------------------------------------------------------------


def examples(split: str, count: int, size: int = 96, seed: int = 0, with_masks: bool = False) -> Iterator[Example]:
    """`count` scenes, made one at a time. Training scenes are square; validation sides vary by up to 15 %."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    for index in range(count):
        rng = np.random.default_rng((seed, SPLITS.index(split), size, index))
        spread = 0.15 if split == "validation" else 0.0
        height, width = np.round(size * rng.uniform(1 - spread, 1 + spread, size=2)).astype(int)
        picture, mask = draw_scene(rng, int(height), int(width))
        masks = encode_png(mask) if with_masks else None
        yield Example(f"{split}_{index:05d}", encode_png(picture), mask_labels(mask), masks)


def build(
    output: Path,
    train: int = 480,
    validation: int = 80,
    size: int = 96,
    seed: int = 0,
    with_masks: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Write `train` and `validation` scenes of about `size` pixels; training masks only if `with_masks`."""
    if train < 1 or validation < 1:
        raise ValueError(f"expected at least one scene a split, got train={train} and validation={validation}")
    if size < 32:
        raise ValueError(f"expected a size of at least 32 pixels (smaller scenes lose the thin parts), got {size}")
    if seed < 0:
        raise ValueError(f"expected a seed of 0 or more, got {seed}")
    check_output(Path(output), overwrite)
    splits = (
        Split("train", examples("train", train, size, seed, with_masks), train, with_masks),
        Split("validation", examples("validation", validation, size, seed, True), validation, True),
    )
    return write_dataset(output, CLASS_NAMES, splits, overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser(__doc__, "shapes")
    parser.add_argument("--train", type=int, default=480, help="training scenes (default: 480)")
    parser.add_argument("--validation", type=int, default=80, help="validation scenes (default: 80)")
    parser.add_argument("--size", type=int, default=96, help="side of a scene in pixels (default: 96)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all scenes (default: 0)")
    arguments = parser.parse_args(argv)
    return run_command(lambda: build(**vars(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
