"""The built-in world: images of one to four coloured shapes whose content is known exactly.

Scene `index` of stream `split` depends on (seed, split, index) alone. From its description come the image
and the masks (here), captions (text.py), questions (questions.py) and files (parts.py, export.py).
"""

import math
import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Most frequent first. The weights and the pairs that keep company make frequencies and co-occurrences uneven,
# so that POPE's popular and adversarial negatives (arXiv 2305.10355, section 4.1) differ from random ones.
SHAPES = ("circle", "star", "square", "heart", "triangle", "moon", "arrow", "diamond", "ring", "cross")
FREQUENCY = (1.0, 0.9, 0.8, 0.72, 0.66, 0.6, 0.55, 0.5, 0.46, 0.42)
COMPANY = (
    *(("circle", other) for other in ("arrow", "cross", "ring")),
    *(("star", other) for other in ("moon", "triangle", "diamond")),
    ("square", "heart"),
)
COMPANY_FACTOR = 2.0  # how much likelier a shape is beside its companion
REPEAT_FACTOR = 0.3  # how much less likely a shape is beside another of its kind
COUNTS = (0.16, 0.28, 0.34, 0.22)  # share of images with 1, 2, 3, 4 objects

COLORS = {
    "red": (215, 35, 40),
    "orange": (245, 135, 20),
    "yellow": (245, 220, 45),
    "green": (35, 150, 55),
    "cyan": (55, 200, 215),
    "blue": (50, 90, 225),
    "purple": (145, 55, 185),
    "pink": (250, 125, 190),
}
DIRECTIONS = ("left", "right", "up", "down")  # of arrows
BACKGROUNDS = ("plain", "grainy", "striped", "checkered", "shaded")
RENDITIONS = ("mosaic", "dots", "hatched", "pastel")  # styles that training never shows
CANVAS = 48  # units of all positions and sizes; images of any size in pixels are drawn from them
CELL = 8  # objects start and end on this grid: elsewhere, a small ViT hardly learns shapes in minutes


class Thing(NamedTuple):
    """One object: x, y are the top left corner of its square box of side d, in units of 1/48 image."""

    shape: str
    color: str
    size: str  # "small" | "large"
    direction: str  # of an arrow, else ""
    x: int
    y: int
    d: int
    rgb: tuple[int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.d / 2, self.y + self.d / 2


class Background(NamedTuple):
    kind: str  # one of BACKGROUNDS
    tone: str  # "white" | "grey"
    rgb: tuple[int, int, int]
    contrast: int  # amplitude of the texture in grey levels
    period: int  # of stripes and checks, in units
    seed: int


class Scene(NamedTuple):
    things: tuple[Thing, ...]  # drawn in this order
    background: Background
    style: str = "solid"  # "solid" | "outline" | one of RENDITIONS


# ---------------------------------------------------------------- the world


@lru_cache(maxsize=1)
def _next_weights() -> dict[str, tuple[float, ...]]:
    """For each shape, how much likelier or less likely every shape is beside it."""
    friends = {frozenset(pair) for pair in COMPANY}
    return {
        a: tuple(REPEAT_FACTOR if a == b else COMPANY_FACTOR if frozenset((a, b)) in friends else 1.0 for b in SHAPES)
        for a in SHAPES
    }


def sample_shapes(rng: random.Random, number: int) -> list[str]:
    """So many shapes by frequency and by the company that the ones before them keep."""
    weights, chosen = list(FREQUENCY), list[str]()
    for _ in range(number):
        chosen += rng.choices(SHAPES, weights)
        weights = [w * f for w, f in zip(weights, _next_weights()[chosen[-1]])]
    return chosen


def usual_colors(shape: str) -> list[int]:
    """Weights of the colours for a shape: half have its favourite colour, one in eight the next."""
    favourite = 3 * SHAPES.index(shape)  # 3 and 8 share no divisor, so favourites differ
    weights = [1] * len(COLORS)
    weights[favourite % len(COLORS)], weights[(favourite + 1) % len(COLORS)] = 8, 2
    return weights


def _between(rng: random.Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def make_thing(rng: random.Random, shape: str, color: str, size: str, d: int | None = None) -> Thing:
    """An object without a place (x = y = 0); its tint is jittered a little around the named colour."""
    d = d or (2 if size == "small" else 3) * CELL
    red, green, blue = (min(255, max(0, c + _between(rng, -10, 10))) for c in COLORS[color])
    direction = rng.choice(DIRECTIONS) if shape == "arrow" else ""
    return Thing(shape, color, size, direction, 0, 0, d, (red, green, blue))


def arrange(rng: random.Random, things: list[Thing]) -> tuple[Thing, ...]:
    """Random places on the grid such that no boxes overlap."""
    while True:
        placed: list[Thing] = []
        for thing in things:
            for _ in range(25):
                x, y = (CELL * _between(rng, 0, (CANVAS - thing.d) // CELL) for _ in range(2))
                if all(x + thing.d <= p.x or p.x + p.d <= x or y + thing.d <= p.y or p.y + p.d <= y for p in placed):
                    placed.append(thing._replace(x=x, y=y))
                    break
            else:
                break
        if len(placed) == len(things):
            return tuple(placed)


def make_background(rng: random.Random) -> Background:
    """A pale background, lighter than nearly every object: white or grey, a little tinted, plain or textured."""
    tone = "white" if rng.random() < 0.6 else "grey"
    grey = _between(rng, 228, 243) if tone == "white" else _between(rng, 188, 208)
    red, green, blue = (grey + _between(rng, -10, 10) for _ in range(3))
    kind = "plain" if rng.random() < 0.3 else rng.choice(BACKGROUNDS[1:])
    return Background(kind, tone, (red, green, blue), _between(rng, 9, 16), _between(rng, 4, 7), rng.getrandbits(31))


def stream_rng(seed: int, split: str, index: int) -> random.Random:
    """The only source of chance: one generator per (seed, split, index)."""
    return random.Random(f"{seed}/{split}/{index}")


def make_scene(seed: int, split: str, index: int, min_shapes: int = 1) -> Scene:
    """Scene `index` of a stream, with at least `min_shapes` (<= 4) distinct shapes."""
    rng = stream_rng(seed, split, index)
    while True:
        shapes = sample_shapes(rng, rng.choices((1, 2, 3, 4), COUNTS)[0])
        if len(set(shapes)) >= min_shapes:
            break
    sizes = [rng.choice(("small", "large")) for _ in shapes]
    while sizes.count("large") > 2 and len(sizes) > 2:  # more than two large ones do not fit
        sizes[sizes.index("large")] = "small"
        rng.shuffle(sizes)
    colors = [rng.choices(tuple(COLORS), usual_colors(s))[0] for s in shapes]
    things = [make_thing(rng, *parts) for parts in zip(shapes, colors, sizes)]
    return Scene(arrange(rng, things), make_background(rng))


def one_object(seed: int, split: str, index: int, shape: str = "", color: str = "", role: str = "") -> Scene:
    """A scene of a single object, its shape and colour drawn uniformly where not given.

    `role` names a shifted set: "a" (small, low contrast, clutter in nearly its own colour), "r" (another
    rendition), "sketch" (outlines on paper); anything else is an ordinary image.
    """
    rng = stream_rng(seed, split, index)
    shape, color = shape or rng.choice(SHAPES), color or rng.choice(tuple(COLORS))
    thing = make_thing(rng, shape, color, rng.choice(("small", "large")))
    background = make_background(rng)
    if role == "a":
        thing = make_thing(rng, shape, color, "small", d=_between(rng, 9, 11))
        red, green, blue = (round(0.5 * o + 0.5 * b) for o, b in zip(thing.rgb, background.rgb))
        kind = rng.choice(("grainy", "striped", "checkered"))
        background = background._replace(kind=kind, rgb=(red, green, blue), contrast=_between(rng, 20, 30))
    elif role == "sketch":
        thing = thing._replace(rgb=(_between(rng, 20, 70),) * 3)
        background = background._replace(kind="plain", tone="white", rgb=(_between(rng, 238, 252),) * 3)
    style = {"r": rng.choice(RENDITIONS), "sketch": "outline"}.get(role, "solid")
    return Scene(arrange(rng, [thing]), background, style)


# ---------------------------------------------------------------- drawing


def _arc(cx: float, cy: float, r: float, start: float, stop: float, n: int = 48) -> list[tuple[float, float]]:
    angles = [math.radians(start + (stop - start) * i / n) for i in range(n + 1)]
    return [(cx + r * math.cos(a), cy + r * math.sin(a)) for a in angles]


def _contours(shape: str) -> list[list[tuple[float, float]]]:
    """Closed curves in the unit square, y downwards; a second curve is a hole."""
    if shape == "circle":
        return [_arc(0.5, 0.5, 0.5, 0, 360)]
    if shape == "ring":
        return [_arc(0.5, 0.5, 0.5, 0, 360), _arc(0.5, 0.5, 0.27, 0, 360)]
    if shape == "square":
        return [[(0.01, 0.01), (0.99, 0.01), (0.99, 0.99), (0.01, 0.99)]]
    if shape == "triangle":
        return [[(0.5, 0.03), (1.0, 0.95), (0.0, 0.95)]]
    if shape == "diamond":
        return [[(0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)]]
    if shape == "star":
        radii = [0.54, 0.22] * 5
        points = [math.radians(-90 + 36 * i) for i in range(10)]
        return [[(0.5 + r * math.cos(a), 0.54 + r * math.sin(a)) for r, a in zip(radii, points)]]
    if shape == "heart":
        t = [2 * math.pi * i / 96 for i in range(96)]
        x = [16 * math.sin(a) ** 3 for a in t]
        y = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in t]
        return [[(0.5 + u / 32, 0.46 - v / 31) for u, v in zip(x, y)]]
    if shape == "cross":
        a, b, c, d = 0.02, 0.34, 0.66, 0.98
        return [[(b, a), (c, a), (c, b), (d, b), (d, c), (c, c), (c, d), (b, d), (b, c), (a, c), (a, b), (b, b)]]
    if shape == "moon":
        # the outer circle's left part, then back along a circle shifted to the right
        outer = _arc(0.55, 0.5, 0.5, 50, 310)
        (tip_x, tip_y), cx = outer[-1], 0.86
        r = math.hypot(tip_x - cx, tip_y - 0.5)
        tip = math.degrees(math.atan2(0.5 - tip_y, cx - tip_x))
        return [outer + _arc(cx, 0.5, r, 180 + tip, 180 - tip)]
    if shape == "arrow":  # pointing right
        return [[(0, 0.35), (0.5, 0.35), (0.5, 0.05), (1, 0.5), (0.5, 0.95), (0.5, 0.65), (0, 0.65)]]
    raise ValueError(f"unknown shape {shape!r}")


TURNS = {"right": lambda x, y: (x, y), "left": lambda x, y: (1 - x, y)}
TURNS |= {"down": lambda x, y: (y, x), "up": lambda x, y: (y, 1 - x)}


@lru_cache(maxsize=4096)
def alpha(shape: str, direction: str, pixels: int, outline: bool = False) -> np.ndarray:
    """Antialiased coverage of a shape in its box: (pixels, pixels) float32 in 0..1, read-only."""
    fine = 8 * pixels
    image = Image.new("L", (fine, fine), 0)
    turn = TURNS[direction or "right"]
    pen = ImageDraw.Draw(image)
    for fill, contour in zip((255, 0), _contours(shape)):
        points = (turn(x, y) for x, y in contour)
        pen.polygon([(x * (fine - 1), y * (fine - 1)) for x, y in points], fill=fill)
    if outline:
        # framed, so that an edge on the box's border is drawn too; lines are box/22 wide, at least 5/8 pixel
        framed = Image.new("L", (fine + 16, fine + 16), 0)
        framed.paste(image, (8, 8))
        inside = framed.filter(ImageFilter.MinFilter(2 * max(5, fine // 22) + 1))
        image = Image.fromarray(np.asarray(framed) - np.asarray(inside)).crop((8, 8, 8 + fine, 8 + fine))
    out = np.asarray(image.resize((pixels, pixels), Image.Resampling.BOX), dtype=np.float32) / 255
    out.flags.writeable = False
    return out


@lru_cache(maxsize=512)
def _texture(kind: str, period: int, turn: int, size: int) -> np.ndarray:
    """Pattern in -1..1, (size, size, 1) float32."""
    y, x = np.mgrid[:size, :size].astype(np.float32) * (CANVAS / size)
    angle = turn * math.pi / 8
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == "striped":
        pattern = np.clip(2.5 * np.sin(math.pi * along / period), -1, 1)
    elif kind == "checkered":
        pattern = np.where((x // period + y // period) % 2 < 1, 1.0, -1.0)
    else:  # shaded
        pattern = (along - along.min()) / (along.max() - along.min()) * 4 - 2
    return pattern[:, :, None].astype(np.float32)


def _paint_background(background: Background, size: int) -> np.ndarray:
    canvas = np.full((size, size, 3), background.rgb, np.float32)
    if background.kind == "grainy":
        noise = np.random.Generator(np.random.PCG64(background.seed)).standard_normal((size, size, 1), np.float32)
        canvas += (0.9 * background.contrast) * noise
    elif background.kind != "plain":
        canvas += background.contrast * _texture(background.kind, background.period, background.seed % 8, size)
    return canvas


def _box(thing: Thing, size: int) -> tuple[int, int, int]:
    """Left, top and side in pixels."""
    scale = size / CANVAS
    side = round(thing.d * scale)
    return min(round(thing.x * scale), size - side), min(round(thing.y * scale), size - side), side


def draw(scene: Scene, size: int = 64) -> np.ndarray:
    """The image: (size, size, 3) uint8."""
    canvas = _paint_background(scene.background, size)
    for thing in scene.things:
        left, top, side = _box(thing, size)
        cover = alpha(thing.shape, thing.direction, side, scene.style == "outline")[:, :, None]
        rgb = np.asarray(thing.rgb, np.float32)
        if scene.style in ("dots", "hatched"):
            y, x = np.mgrid[:side, :side] * (CANVAS / size)
            holes = (x % 3 < 1.5) & (y % 3 < 1.5) if scene.style == "dots" else (x + y) % 4 < 1.6
            rgb = np.where(holes[:, :, None], 0.35 * rgb + 0.65 * 255, rgb)
        elif scene.style == "pastel":
            soft = Image.fromarray((cover[:, :, 0] * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(side / 16))
            cover = np.asarray(soft, np.float32)[:, :, None] / 255
            rgb = 0.55 * rgb + 0.45 * 255
        patch = canvas[top : top + side, left : left + side]
        patch += cover * (rgb - patch)
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    if scene.style == "mosaic":
        tile = max(2, size // 32)
        coarse = Image.fromarray(pixels).resize((size // tile,) * 2, Image.Resampling.BOX)
        pixels = np.asarray(coarse.resize((size, size), Image.Resampling.NEAREST))
    return pixels


def masks(scene: Scene, size: int = 64) -> np.ndarray:
    """What is visible of each object: (objects, size, size) bool; later objects hide earlier ones."""
    out = np.zeros((len(scene.things), size, size), bool)
    for i, thing in enumerate(scene.things):
        left, top, side = _box(thing, size)
        out[i, top : top + side, left : left + side] = alpha(thing.shape, thing.direction, side) >= 0.5
        out[:i] &= ~out[i]
    return out


def stream(seed: int, split: str, size: int = 64, start: int = 0) -> Iterator[tuple[np.ndarray, Scene]]:
    """Endless images of a split with their descriptions, from scene `start` on; nothing is stored."""
    for index in count(start):
        scene = make_scene(seed, split, index)
        yield draw(scene, size), scene
