"""Draws the signs of the 14 findings on a synthetic chest film, each in its usual place, and says
where.

A sign takes the film, a generator of its own (for where it lies: the same at every follow-up of a
patient) and a strength (1 is a textbook sign, 0.2 barely there). It returns its regions, float32
(size, size), from which the boxes are measured.
"""

import numpy as np

from chexlib.findings import FINDINGS
from chexlib.phantom.anatomy import cloud, edges, soft


def side_of(rng):
    """-1 is the patient's right (left in the picture), +1 the left."""
    return -1 if rng.random() < 0.55 else 1


def deform(g, finding, rng, s):
    """What a finding does to the shape of the chest, before anything is drawn."""
    mild = min(s, 1.5)
    if finding == "Cardiomegaly":
        g.ctr = max(g.ctr, 0.505) + 0.06 * s
    elif finding == "Emphysema":
        g.dome += 0.05 * s
        g.angle *= 1 - 0.5 * mild
        g.ctr, g.depth, g.markings = (
            g.ctr * (1 - 0.12 * mild),
            g.depth + 0.05 * s,
            g.markings * (1 - 0.4 * mild),
        )
    elif finding == "Fibrosis":
        g.dome, g.width = g.dome - 0.03 * s, g.width * (1 - 0.03 * s)
    elif finding == "Atelectasis":
        g.dome[(side_of(rng) + 1) // 2] -= 0.04 * s
    elif finding == "Edema":
        g.ctr, g.markings = g.ctr + 0.015 * s, g.markings * (1 + 0.35 * s)


def spot(f, side, height, across):
    """A point of the lung: height 0 (apex) to 1 (dome), across 0 (mediastinum) to 1 (chest wall)."""
    v = f.g.top + height * (f.g.dome[(side + 1) // 2] - f.g.top)
    lateral, medial = edges(f.g, v)
    if side > 0 and height > 0.6:
        medial = max(medial, f.g.ctr * f.g.width)  # beside the heart, not behind it
    return side * (medial + across * (lateral - medial)), v


def _half(f, side):
    return soft(side * f.u, 0.02)


def atelectasis(f, rng, s):
    side = side_of(rng)
    region = np.zeros_like(f.v)
    for _ in range(rng.integers(1, 4)):
        x, y = spot(f, side, rng.uniform(0.72, 0.93), rng.uniform(0.3, 0.65))
        plate = f.disc(
            x, y, rng.uniform(0.07, 0.12), rng.uniform(0.009, 0.018), tilt=rng.uniform(-0.4, 0.4)
        )
        region = np.maximum(region, soft(1.1 - plate, 0.5))
    floor = f.g.dome[(side + 1) // 2]
    loss = (
        soft(f.v - floor + 0.1 + 0.5 * (f.a - 0.1), 0.05) * _half(f, side) * rng.uniform(0.2, 0.7)
    )
    return [f.fill(np.clip(0.75 * s * np.maximum(region, loss), 0, 0.95))]


def cardiomegaly(f, rng, s):
    return [f.heart]


def effusion(f, rng, s):
    sides = (-1, 1) if rng.random() < 0.3 else (side_of(rng),)
    size, regions = rng.uniform(0.6, 1.2), []
    for side in sides:
        level = f.g.dome[(side + 1) // 2] + f.g.angle * 0.5 - 0.13 * s * size
        surface = level - 0.16 * np.clip((f.a - 0.14) / (f.g.width - 0.14), 0, 1) ** 2 * min(s, 1.2)
        regions.append(f.fill(0.93 * soft(f.v - surface, 0.022) * _half(f, side)))
    return regions


def infiltration(f, rng, s):
    side, region = side_of(rng), 0
    for k in range(rng.integers(1, 4)):
        x, y = spot(f, side if k < 2 else -side, rng.uniform(0.35, 0.9), rng.uniform(0.15, 0.7))
        region = region + np.exp(-f.disc(x, y, rng.uniform(0.07, 0.12)))
    patches = soft(cloud(rng, f.size, 18) + 0.5 * cloud(rng, f.size, 9) + 0.4, 1.3)
    return [f.fill(np.clip(0.75 * s * np.minimum(region, 1) * patches, 0, 0.8))]


def _round(f, x, y, radius, rng, lobes):
    angle = np.arctan2(f.v - np.float32(y), f.u - np.float32(x))
    wobble = (
        1
        + lobes * np.sin(3 * angle + rng.uniform(0, 6))
        + 0.6 * lobes * np.sin(5 * angle + rng.uniform(0, 6))
    )
    return np.sqrt(f.disc(x, y, radius)) / wobble


def mass(f, rng, s):
    x, y = spot(f, side_of(rng), rng.uniform(0.2, 0.85), rng.uniform(0.2, 0.75))
    body = soft(1 - _round(f, x, y, rng.uniform(0.05, 0.085), rng, 0.07), 0.22)
    return [f.fill(min(0.25 + 0.6 * s, 0.95) * body)]


def nodule(f, rng, s):
    regions = []
    for _ in range(1 + (rng.random() < 0.35) + 2 * (rng.random() < 0.15)):
        x, y = spot(f, side_of(rng), rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.8))
        ball = soft(1 - _round(f, x, y, rng.uniform(0.024, 0.038), rng, 0.03), 0.3)
        f.extra += 0.05 * s * ball * f.lung
        regions.append(f.fill(min(0.15 + 0.65 * s, 0.95) * ball))
    return regions


def pneumonia(f, rng, s):
    side = side_of(rng)
    x, y = spot(f, side, rng.uniform(0.5, 0.85), rng.uniform(0.25, 0.55))
    focus = soft(
        1.2
        - f.disc(x, y, rng.uniform(0.09, 0.13), rng.uniform(0.08, 0.12), tilt=0.3)
        + 0.3 * cloud(rng, f.size, 10),
        0.9,
    )
    root = np.array([side * 0.08, 0.43])
    aim = np.array([[x, y]]) + rng.normal(0, 0.045, (7, 2))
    steps = np.linspace(0.25, 1.15, 5)[None, :, None]
    bronchi = f.strokes(root + steps * (aim[:, None] - root), np.full((7, 4), 0.009), [1.0] * 7)
    return [f.fill(np.clip(0.8 * s * focus, 0, 0.9) * (1 - 0.75 * bronchi))]


def pneumothorax(f, rng, s):
    side, g = side_of(rng), f.g
    inset = (0.02 + 0.06 * s * rng.uniform(0.7, 1.2)) * (1 - 0.75 * soft(f.v - 0.45, 0.3))
    lateral, _ = edges(g, f.v, inset)
    across, down = lateral - f.a, 0.8 * (f.v - g.top - 1.7 * inset)
    depth = 0.5 * (across + down - np.hypot(across - down, 0.05))  # a rounded minimum
    thin = max(0.006, 0.8 / f.size)
    gas = (1 - soft(depth, thin)) * f.lung * _half(f, side)
    f.vessels *= 1 - gas
    f.extra += 0.10 * min(0.5 + s, 1.3) * np.exp(-((depth / thin) ** 2)) * f.lung * _half(f, side)
    f.extra -= 0.10 * min(0.3 + s, 1.4) * gas
    f.fill(0.12 * s * f.lung * _half(f, side) * (1 - gas))
    return [gas]


def consolidation(f, rng, s):
    side, kind = side_of(rng), rng.integers(3)
    fissure = 0.41 + 0.1 * (f.a - 0.2) + 0.015 * rng.normal()
    sharp, blurred = 0.006, 0.06
    if kind == 0:  # upper lobe above the horizontal fissure
        lobe = soft(fissure - f.v, sharp) * soft(f.v - fissure + rng.uniform(0.12, 0.25), blurred)
    elif kind == 1:  # middle lobe or lingula below it
        lobe = soft(f.v - fissure, sharp) * soft(fissure + rng.uniform(0.12, 0.18) - f.v, blurred)
    else:  # lower lobe
        lobe = soft(f.v - fissure - 0.14 + 0.2 * f.a, blurred) * soft(f.a - 0.1, 0.05)
    lobe = (
        lobe
        * _half(f, side)
        * soft(f.a - rng.uniform(0.05, 0.12), 0.05)
        * (0.92 + 0.08 * cloud(rng, f.size, 8))
    )
    return [f.fill(np.clip((0.2 + 0.75 * s) * lobe, 0, 0.95))]


def edema(f, rng, s):
    wings = np.exp(-(((f.a - 0.13) / 0.085) ** 2) - ((f.v - 0.46) / 0.15) ** 2)
    haze = np.clip(0.65 * s * wings * (1 + 0.2 * cloud(rng, f.size, 14)), 0, 0.9)
    side = np.repeat([-1.0, 1.0], 8)
    y = min(f.g.dome) + rng.uniform(-0.13, 0.06, 16)
    lateral, _ = edges(f.g, y)
    ends = np.stack([np.stack([side * (lateral - r), y], -1) for r in (0.008, 0.055)], 1)
    f.extra += 0.10 * min(s, 1.3) * f.strokes(ends, np.full((16, 1), 0.005), [1.0] * 16) * f.lung
    return [f.fill(haze)]


def emphysema(f, rng, s):
    for _ in range(3):  # bullae: round, without vessels
        x, y = spot(f, side_of(rng), rng.uniform(0.1, 0.5), rng.uniform(0.4, 0.85))
        q = f.disc(x, y, rng.uniform(0.04, 0.075))
        f.vessels *= 1 - min(s, 1) * soft(1 - q, 0.15)
        f.extra += 0.04 * s * soft(0.12 - np.abs(q - 1), 0.12) * f.lung
    return [f.lung]


def fibrosis(f, rng, s):
    where = soft(f.v - 0.45, 0.2) * (0.35 + 0.65 * soft(f.a - 0.2, 0.08)) * f.lung
    net = np.exp(-((cloud(rng, f.size, 44) / 0.35) ** 2)) + 0.8 * np.exp(
        -((cloud(rng, f.size, 26) / 0.25) ** 2)
    )
    f.extra += 0.17 * s * where * (net - 0.3)
    f.fill(np.clip(0.2 * s * where, 0, 0.6))
    return [where]


def pleural_thickening(f, rng, s):
    side, top = side_of(rng), rng.uniform(0.0, 0.3)
    thick = rng.uniform(0.022, 0.036) * (0.6 + 0.5 * min(s, 1.5))
    thick = thick * (1 + 0.4 * np.sin(f.v * 40 + rng.uniform(0, 6)))
    span = soft(f.v - f.g.top - top + 0.04, 0.05) * soft(
        f.g.top + top + rng.uniform(0.2, 0.4) - f.v, 0.06
    )
    depth = np.minimum(f.lateral - f.a, (f.v - f.g.top) * 0.9)
    rind = soft(thick - depth, 0.007) * span * _half(f, side)
    f.extra += 0.11 * s * rind * f.lung
    return [f.fill(np.clip((0.35 + 0.6 * s) * rind, 0, 0.95))]


def hernia(f, rng, s):
    radius = rng.uniform(0.1, 0.14) * (0.8 + 0.25 * min(s, 1.5))
    # Most of the stomach lies in the chest.
    x, y = rng.uniform(-0.02, 0.06), f.g.dome[1] - 0.8 * radius
    q = f.disc(x, y, radius, radius * 0.9)
    sac, strength = soft(1 - q, 0.15), min(0.7 + 0.5 * s, 1.4)
    f.fill(0.8 * sac)
    f.extra += strength * (0.08 * sac + 0.03 * soft(0.2 - np.abs(q - 1), 0.2))
    f.extra -= 0.26 * strength * soft(0.85 - q, 0.2) * soft(y - 0.1 * radius - f.v, 0.006)
    return [sac]


SIGNS = {finding: globals()[finding.lower()] for finding in FINDINGS}
