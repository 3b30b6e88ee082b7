"""Draws one synthetic chest radiograph from its description: a pure function, the same for the same
seed.
"""

from dataclasses import astuple, dataclass

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
    strengths = {}
    for finding in d.shown:
        k = FINDINGS.index(finding)
        drawn = stream(d.seed, d.patient, 3, d.follow_up, k).standard_normal()
        strength = float(np.clip(level.strength * np.exp(level.spread * drawn), 0.1, 1.8))
        signs.deform(shape, finding, stream(d.seed, d.patient, 2, k), strength)
        strengths[finding] = strength
    film = thorax.Film(shape, size)
    _lookalikes(film, rng, level.lookalikes)
    boxes = []
    for finding, strength in strengths.items():
        where = stream(d.seed, d.patient, 2, FINDINGS.index(finding))
        regions = signs.SIGNS[finding](film, where, strength)
        if finding in d.findings:
            boxes += [(finding, *box) for box in map(_box, regions) if box]
    grey = thorax.expose(film, rng, stream(d.seed, d.patient, 4))
    return _develop(grey, shape, rng, level.noise), boxes


def _box(region):
    """Bounding box, in fractions of the side, of where a sign is at least 0.3 of its strongest."""
    strongest, n = region.max(), len(region)
    if strongest < 0.02:
        return None
    inside = region > 0.3 * strongest
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    x, y = columns[0], rows[0]
    return x / n, y / n, (columns[-1] + 1 - x) / n, (rows[-1] + 1 - y) / n


def _develop(grey, shape, rng, noise):
    """Focus, quantum noise, exposure, collimation and 8 bits."""
    n, ap = len(grey), shape.ap
    grey = gaussian_filter(grey, (0.004 + 0.0015 * ap) * n, truncate=2.5)
    grain = np.float32(noise * (1 + 0.4 * ap) * np.exp(0.25 * rng.normal()))
    grey += grain * rng.standard_normal(grey.shape, dtype=np.float32) * (0.6 + 0.7 * grey)
    gain = np.float32(1.06 * np.exp(0.13 * rng.normal()))
    gamma = np.float32(np.exp(0.2 * rng.normal()))
    fog = 0.02 * rng.random()
    grey = fog + np.power(np.clip(grey * gain, 0, 1.6), gamma)
    # The film's shoulder.
    grey = np.where(grey > 0.75, 1 - 0.25 * np.exp((0.75 - grey) * 4), grey)
    if rng.random() < 0.15:  # an edge of the collimator, or a white margin
        edge = int(n * rng.uniform(0.01, 0.05)) + 1
        turns = rng.integers(4)
        np.rot90(grey, turns)[:edge] = 0.02 if rng.random() < 0.7 else 0.97
    return np.clip(grey * 255 + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Odds:
    """How often a film without a finding shows what may be taken for one."""

    haze: float = 0.4
    nipples: float = 0.2
    fold: float = 0.04  # of skin
    blunted: float = 0.15  # costophrenic angle
    vessel: float = 0.25  # seen end on
    leads: float = 0.05  # of an electrocardiogram
    line: float = 0.03  # central venous


PA_ODDS, AP_ODDS = Odds(), Odds(fold=0.15, leads=0.55, line=0.35)


def _lookalikes(film, rng, amount):
    """What normal films show too: haze, nipples, skin folds, a blunted angle, leads and lines
    (mostly AP).
    """
    odds = astuple(AP_ODDS if film.g.ap else PA_ODDS)
    haze, nipples, fold, blunted, vessel, leads, line = rng.random(7) < odds
    u, v = film.u, film.v
    side = signs.side_of(rng)
    x, y = signs.spot(film, side, rng.uniform(0.3, 0.95), rng.uniform(0.1, 0.8))
    if haze:
        opacity = 0.3 * amount * rng.random() ** 2 * film.glow(x, y, 0.12, 0.09)
        film.fill(np.clip(opacity, 0, 0.6))
    if nipples:
        for s in (-1, 1):
            height = 0.6 + 0.02 * rng.normal()
            nipple = film.ellipse(s * 0.19, height, 0.018, edge=0.4)
            film.fill(0.3 * min(amount, 1.5) * nipple)
    if fold:
        beyond = side * u - 0.24 - 0.25 * (v - 0.4) * rng.uniform(-1, 1)
        density = 0.05 * amount * soft(beyond, 0.01)
        density *= soft(0.06 - beyond, 0.06)
        density *= soft(v - 0.2, 0.1)
        density *= soft(0.6 - v, 0.1)
        film.extra += density
    if blunted:
        low = soft(v - film.floor + 0.05 * amount * rng.random(), 0.02)
        film.fill(0.7 * low * soft(side * u - 0.2, 0.03))
    if vessel:
        across, height = side * rng.uniform(0.09, 0.16), rng.uniform(0.35, 0.52)
        film.fill(0.5 * amount * film.ellipse(across, height, 0.011, edge=0.4))
    paths, t = [], np.linspace(0, 1, 12)[:, None]
    if leads:
        for _ in range(rng.integers(1, 4)):
            bow = rng.uniform(-0.3, 0.3, 2)
            start = rng.uniform((-0.3, 0.2), (0.3, 0.5))
            end = rng.uniform((-0.5, 0.3), (0.5, 1.0))
            paths.append(start + t * (end - start) + t * (1 - t) * bow)
    if line:
        across, down = -0.03 - 0.2 * (1 - t) ** 3, 0.17 + 0.3 * t + 0.02 * np.sin(6 * t)
        paths.append(np.hstack([across, down]))
    if n := len(paths):
        film.over += 0.16 * film.strokes(np.stack(paths), np.full((n, 11), 0.0055), [1.0] * n)
