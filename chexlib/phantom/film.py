"""Draws one synthetic chest radiograph from its description: a pure function, the same for the same
seed.
"""

import numpy as np
from scipy.ndimage import gaussian_filter

from chexlib.findings import FINDINGS
from chexlib.phantom import anatomy as thorax
from chexlib.phantom import signs
from chexlib.phantom.anatomy import soft
from chexlib.phantom.population import level_of, stream


def render(description, *, size=128, difficulty="standard"):
    """Draw one radiograph.

    Parameters
    ----------
    description : Description
    size : int
        Pixels per side.
    difficulty : {"easy", "standard", "hard"} or Difficulty

    Returns
    -------
    image : np.ndarray, (size, size) uint8
    boxes : list of (finding, x, y, width, height)
        Fractions of the side, for each finding that is both labelled and shown.
    """
    d = description
    level = level_of(difficulty)
    shape = thorax.anatomy(d, stream(d.seed, d.patient, 0))
    rng = stream(d.seed, d.patient, 1, d.follow_up)
    thorax.posture(shape, d, rng, level.lookalikes)
    strength = {}
    for finding in d.shown:
        k = FINDINGS.index(finding)
        drawn = stream(d.seed, d.patient, 3, d.follow_up, k).standard_normal()
        strength[finding] = float(np.clip(level.strength * np.exp(level.spread * drawn), 0.1, 1.8))
        signs.deform(shape, finding, stream(d.seed, d.patient, 2, k), strength[finding])
    film = thorax.Film(shape, size)
    _lookalikes(film, rng, level.lookalikes)
    boxes = []
    for finding, s in strength.items():
        regions = signs.SIGNS[finding](
            film, stream(d.seed, d.patient, 2, FINDINGS.index(finding)), s
        )
        if finding in d.findings:
            boxes += [(finding, *box) for box in map(_box, regions) if box]
    grey = thorax.expose(film, rng, stream(d.seed, d.patient, 4))
    return _develop(grey, shape, rng, level.noise), boxes


def _box(region):
    """Bounding box, in fractions of the side, of where a sign is at least 0.3 of its strongest."""
    if region.max() < 0.02:
        return None
    rows, columns = (np.flatnonzero((region > 0.3 * region.max()).any(axis)) for axis in (1, 0))
    x, y, n = columns[0], rows[0], len(region)
    return x / n, y / n, (columns[-1] + 1 - x) / n, (rows[-1] + 1 - y) / n


def _develop(grey, shape, rng, noise):
    """Focus, quantum noise, exposure, collimation and 8 bits."""
    n, ap = len(grey), shape.ap
    grey = gaussian_filter(grey, (0.004 + 0.0015 * ap) * n, truncate=2.5)
    grain = noise * (1 + 0.4 * ap) * np.exp(0.25 * rng.normal())
    grey += (
        np.float32(grain) * rng.standard_normal(grey.shape, dtype=np.float32) * (0.6 + 0.7 * grey)
    )
    gain, gamma, fog = (
        1.06 * np.exp(0.13 * rng.normal()),
        np.exp(0.2 * rng.normal()),
        0.02 * rng.random(),
    )
    grey = np.clip(grey * np.float32(gain), 0, 1.6)
    grey = fog + np.power(grey, np.float32(gamma))
    # The film's shoulder.
    grey = np.where(grey > 0.75, 1 - 0.25 * np.exp((0.75 - grey) * np.float32(4)), grey)
    if rng.random() < 0.15:
        edge = int(n * rng.uniform(0.01, 0.05)) + 1
        turns = rng.integers(4)
        np.rot90(grey, turns)[:edge] = 0.02 if rng.random() < 0.7 else 0.97
    return np.clip(grey * 255 + 0.5, 0, 255).astype(np.uint8)


def _lookalikes(f, rng, amount):
    """What normal films show too: haze, nipples, skin folds, a blunted angle, leads and lines
    (mostly AP).
    """
    g, odds = f.g, rng.random(7)
    side = signs.side_of(rng)
    x, y = signs.spot(f, side, rng.uniform(0.3, 0.95), rng.uniform(0.1, 0.8))
    if odds[0] < 0.4:
        f.fill(
            np.clip(0.3 * amount * rng.random() ** 2 * np.exp(-f.disc(x, y, 0.12, 0.09)), 0, 0.6)
        )
    if odds[1] < 0.2:
        for s in (-1, 1):
            f.fill(
                0.3
                * min(amount, 1.5)
                * soft(1 - f.disc(s * 0.19, 0.6 + 0.02 * rng.normal(), 0.018), 0.4)
            )
    if odds[2] < (0.15 if g.ap else 0.04):
        fold = side * f.u - 0.24 - 0.25 * (f.v - 0.4) * rng.uniform(-1, 1)
        f.extra += (
            0.05
            * amount
            * soft(fold, 0.01)
            * soft(0.06 - fold, 0.06)
            * soft(f.v - 0.2, 0.1)
            * soft(0.6 - f.v, 0.1)
        )
    if odds[3] < 0.15:
        f.fill(
            0.7
            * soft(f.v - f.floor + 0.05 * amount * rng.random(), 0.02)
            * soft(side * f.u - 0.2, 0.03)
        )
    if odds[4] < 0.25:  # a vessel seen end on
        f.fill(
            0.5
            * amount
            * soft(1 - f.disc(side * rng.uniform(0.09, 0.16), rng.uniform(0.35, 0.52), 0.011), 0.4)
        )
    lines = []
    if odds[5] < (0.55 if g.ap else 0.05):  # electrocardiogram leads
        for _ in range(rng.integers(1, 4)):
            bow = rng.uniform(-0.3, 0.3, 2)
            t = np.linspace(0, 1, 12)
            start, end = rng.uniform((-0.3, 0.2), (0.3, 0.5)), rng.uniform((-0.5, 0.3), (0.5, 1.0))
            lines.append(start + t[:, None] * (end - start) + (t * (1 - t))[:, None] * bow)
    if odds[6] < (0.35 if g.ap else 0.03):  # central line
        t = np.linspace(0, 1, 12)
        lines.append(
            np.stack([-0.03 - 0.2 * (1 - t) ** 3, 0.17 + 0.3 * t + 0.02 * np.sin(6 * t)], -1)
        )
    if lines:
        f.over += 0.16 * f.strokes(
            np.stack(lines), np.full((len(lines), 11), 0.0055), [1.0] * len(lines)
        )
