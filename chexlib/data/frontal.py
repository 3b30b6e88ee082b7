"""Whether an image looks like an upright frontal chest radiograph: simple statistics, and no
learning from people.

The image, averaged to 16 x 16 px, is correlated with the mean of a few phantoms: dark lungs on both
sides of a bright mediastinum above a bright abdomen. Upright films correlate with it, turned and
inverted ones less or negatively, and noise not at all. It is a warning for whoever mixed up a
folder, no guarantee: a lateral film, a film of a child or a good drawing may pass.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

from chexlib.data.cache import DARK, resize_area, too_dark
from chexlib.phantom.write import phantom_images

SIDE = 16  # px; fine enough for lungs, too coarse for disease
# Of 437 and 998 NIH radiographs, 5 and 5 have less (README), some of them shown inverted.
LEAST_LIKENESS = 0.3
# Grey levels between the strongest and the weakest of red, green, blue, on average.
MOST_COLOUR = 10.0
LONGEST = 2.0  # sides, as a ratio
LEAST_CONTRAST = 4.0  # grey levels, standard deviation


def frontal_doubt(image: np.ndarray, *, colour: float = 0.0) -> str:
    """Why an image does not look like an upright frontal chest radiograph, or "" if it does.

    Parameters
    ----------
    image : (height, width) uint8
    colour : float
        Mean difference of the strongest and the weakest of red, green and blue, in grey levels.
    """
    if colour > MOST_COLOUR:
        return f"it is in colour (channels differ by {colour:.0f} grey levels)"
    longest = max(image.shape) / min(image.shape)
    if longest > LONGEST:
        return f"it is {longest:.1f} times as long as wide"
    small = resize_area(image, SIDE).astype(float)
    if small.std() < LEAST_CONTRAST:
        return f"it has hardly any contrast (standard deviation {small.std():.1f} grey levels)"
    likeness = [
        float((_template() * np.rot90(_standard(small), turns)).mean()) for turns in range(4)
    ]
    if likeness[0] >= LEAST_LIKENESS and likeness[0] == max(likeness):
        return (
            f"it is very dark (95 % of it is below {DARK} of 255 grey levels)"
            if too_dark(image)
            else ""
        )
    turns = int(np.argmax(likeness))
    if -likeness[0] > max(LEAST_LIKENESS, likeness[turns]):
        return f"it seems to be inverted, white for black (likeness {likeness[0]:.2f})"
    if turns and likeness[turns] >= LEAST_LIKENESS:
        # rot90 turns anticlockwise: what that sets right was turned clockwise.
        return f"it seems to be turned by {90 * turns} degrees clockwise"
    return f"it is unlike a frontal chest radiograph (likeness {likeness[0]:.2f})"


@functools.cache
def _template() -> np.ndarray:
    films = itertools.islice(phantom_images(0, size=64, difficulty="easy"), 32)
    return _standard(
        np.mean([_standard(resize_area(film, SIDE).astype(float)) for film, _ in films], axis=0)
    )


def _standard(image: np.ndarray) -> np.ndarray:
    return (image - image.mean()) / image.std()
