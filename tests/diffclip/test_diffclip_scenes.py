"""The built-in world: chance, placement, drawing; what is drawn is checked against what the scene says."""

import random
from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest

from diffclip.scenes import drawing as scenes
from diffclip.scenes.drawing import COLORS, SHAPES, draw, make_scene, masks, one_object

SOME = [make_scene(0, "test", i) for i in range(400)]


def test_a_scene_depends_only_on_seed_split_and_index():
    order = list(range(60))
    random.Random(3).shuffle(order)
    mixed = {i: make_scene(5, "x", i) for i in order}
    assert [mixed[i] for i in range(60)] == [make_scene(5, "x", i) for i in range(60)]
    assert len({mixed[0], make_scene(6, "x", 0), make_scene(5, "y", 0), make_scene(5, "x", 1)}) == 4
    picture, scene = next(islice(scenes.stream(5, "x", 48, start=7), 1))
    assert scene == mixed[7] and np.array_equal(picture, draw(mixed[7], 48))


def test_known_scene_stays_the_same():
    """A frozen sample: change VERSION in export.py when this has to change."""
    scene = make_scene(0, "pretrain", 0)
    assert [(t.size, t.color, t.shape, t.x, t.y, t.d) for t in scene.things] == KNOWN


KNOWN = [
    ("small", "blue", "square", 24, 24, 16),
    ("large", "green", "arrow", 0, 8, 24),
    ("small", "red", "ring", 0, 32, 16),
    ("large", "green", "heart", 24, 0, 24),
]


def test_objects_lie_inside_and_apart():
    for scene in SOME:
        assert 1 <= len(scene.things) <= 4
        for t in scene.things:
            assert t.x >= 0 and t.x + t.d <= 48 and t.y >= 0 and t.y + t.d <= 48
            assert (t.size == "small") == (t.d < 18)
        for p, q in combinations(scene.things, 2):
            across = min(p.x + p.d, q.x + q.d) - max(p.x, q.x)
            down = min(p.y + p.d, q.y + q.d) - max(p.y, q.y)
            assert min(across, down) <= 0


@pytest.mark.parametrize("size", [48, 64, 100])
def test_masks_show_where_the_named_colours_are(size):
    named = np.array(list(COLORS.values()), float)
    for scene in SOME[:150]:
        picture, visible = draw(scene, size).astype(float), masks(scene, size)
        assert picture.shape == (size, size, 3) and visible.shape == (len(scene.things), size, size)
        assert visible.sum(0).max() <= 1
        for thing, mask in zip(scene.things, visible):
            rows, columns = np.nonzero(mask)
            scale = size / 48
            assert thing.x * scale - 1 <= columns.min() and columns.max() <= (thing.x + thing.d) * scale + 1
            assert thing.y * scale - 1 <= rows.min() and rows.max() <= (thing.y + thing.d) * scale + 1
            middle = np.median(picture[mask], axis=0)
            nearest = list(COLORS)[np.abs(named - middle).sum(1).argmin()]
            assert nearest == thing.color, (thing, middle)


def test_objects_stand_out_from_the_background():
    for scene in SOME:
        picture, visible = draw(scene).astype(float), masks(scene)
        ground = np.median(picture[~visible.any(0)], axis=0)
        for mask in visible:
            assert np.abs(np.median(picture[mask], axis=0) - ground).max() > 45


def test_shapes_are_distinct_even_when_small():
    """Coverages at 14 pixels, the size a small object has in a 48-pixel input, differ pairwise."""
    variants = [(s, "") for s in SHAPES if s != "arrow"] + [("arrow", d) for d in scenes.DIRECTIONS]
    covers = {v: scenes.alpha(*v, 14) for v in variants}
    for one, other in combinations(variants, 2):
        union = np.maximum(covers[one], covers[other]).sum()
        assert np.minimum(covers[one], covers[other]).sum() / union < 0.82, (one, other)


def test_areas_agree_with_geometry():
    d = 40
    exact = {
        "circle": np.pi / 4,
        "ring": np.pi * (0.5**2 - 0.27**2),
        "square": 0.98**2,
        "triangle": 0.92 / 2,
        "diamond": 0.4,
        "cross": 2 * 0.96 * 0.32 - 0.32**2,
        "arrow": 0.5 * 0.3 + 0.9 * 0.5 / 2,
    }
    for shape, area in exact.items():
        assert scenes.alpha(shape, "", d).mean() == pytest.approx(area, rel=0.03), shape


def test_arrows_have_their_head_where_they_point():
    for direction, (axis, sign) in {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}.items():
        cover = scenes.alpha("arrow", direction, 24)
        widths = cover.sum(axis=1 - axis)[::sign]  # from tail to tip
        assert widths[14] > 1.8 * widths[9] and widths[23] < widths[0]


def test_frequencies_and_company_are_uneven_but_every_shape_is_common():
    world = [Counter(t.shape for t in make_scene(0, "frequency", i).things) for i in range(4000)]
    share = {s: sum(s in c for c in world) / len(world) for s in SHAPES}
    assert min(share.values()) > 0.12 and 1.8 < share["circle"] / share["cross"] < 3.5
    assert 0.02 < sum(max(c.values()) > 1 for c in world) / len(world) < 0.25
    beside = sum("star" in c and "moon" in c for c in world) / len(world)
    apart = sum("circle" in c and "moon" in c for c in world) / len(world)
    assert beside > 1.3 * apart  # although circles are more frequent than stars


@pytest.mark.slow
def test_shifted_sets_are_what_they_are_called():
    def contrast(role):
        values = []
        for i in range(60):
            scene = one_object(0, f"s{role}", i, shape="circle", role=role)
            picture, mask = draw(scene).astype(float), masks(scene)[0]
            values.append(np.abs(np.median(picture[mask], 0) - np.median(picture[~mask], 0)).max())
        return np.mean(values)

    assert contrast("a") < 0.75 * contrast("")
    for i in range(40):
        sketch = one_object(1, "sketch", i, role="sketch")
        picture = draw(sketch).astype(int)
        assert np.ptp(picture, axis=2).max() == 0  # grey lines on paper
        assert 20 < (picture[:, :, 0] < 200).sum() < masks(sketch)[0].sum()
    styles = {one_object(1, "r", i, role="r").style for i in range(40)}
    assert styles == set(scenes.RENDITIONS)
    plain = one_object(1, "r", 0)._replace(style="solid")
    assert all((draw(plain._replace(style=s)) != draw(plain)).any() for s in styles)
