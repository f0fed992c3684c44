"""Heat over an image: dark where it is cold, of the colour map where it is hot."""

import numpy as np
from matplotlib import colormaps

from diffclip.base.overlay import overlay


def test_cold_places_are_the_image_darkened_and_hot_ones_coloured():
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 3))
    cold = overlay(image, np.zeros((3, 4)))
    assert cold.shape == (3, 4, 3) and cold.dtype == np.uint8
    assert np.abs(cold - (0.55 * image + 60)).max() <= 1
    heat = np.zeros((3, 4))
    heat[1, 2] = 0.2  # whatever its size: the largest is the hottest
    shown = overlay(image, heat)
    wanted = 0.35 * (0.55 * image[1, 2] + 60) + 0.65 * 255 * np.array(colormaps["inferno"](1.0)[:3])
    assert np.abs(shown[1, 2] - wanted).max() <= 1
    heat[1, 2] = 0
    assert (np.delete(shown.reshape(12, 3), 6, 0) == np.delete(overlay(image, heat).reshape(12, 3), 6, 0)).all()


def test_maps_with_one_top_compare():
    image = np.full((1, 3, 3), 128)
    heat = np.array([[0.1, 0.2, 0.4]])
    assert (overlay(image, heat, top=0.8)[0, 2] != overlay(image, heat)[0, 2]).any()
    assert (overlay(image, heat, top=0.8)[0, 2] == overlay(image, heat)[0, 1]).all()  # half as hot
    assert (overlay(image, heat, top=0.8) == overlay(image, heat * 10, top=8)).all()
    assert (overlay(image, heat) == overlay(image, heat * 7)).all()
