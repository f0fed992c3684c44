"""Heat over an image."""

import numpy as np
from matplotlib import colormaps


def overlay(image: np.ndarray, heat: np.ndarray, top: float | None = None) -> np.ndarray:
    """The image (height, width, 3) of 0 to 255, darkened where heat is low and tinted where it is high, as uint8.

    `heat` is (height, width), not negative; `top` is shown as the hottest, by default its maximum.
    """
    share = (heat / max(float(heat.max()) if top is None else top, 1e-12))[:, :, None]
    colour = 255 * colormaps["inferno"](share[:, :, 0])[:, :, :3]
    return ((1 - 0.65 * share) * (0.55 * image + 60) + 0.65 * share * colour).clip(0, 255).astype("uint8")
