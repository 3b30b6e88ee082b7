"""Draws the signs of the 14 findings on a synthetic chest film, each in its usual place, and says
where.

A sign takes the film, a generator of its own (for where it lies: the same at every follow-up of a
patient) and a strength (1 is a textbook sign, 0.2 barely there). It returns its regions, float32
(size, size), from which the boxes are measured. Units are those of `anatomy`.
"""

import numpy as np

from chexlib.findings import FINDINGS
from chexlib.phantom.anatomy import bell, cloud, edges, soft

FISSURE = 0.41  # height of the horizontal fissure


def side_of(rng):
    """-1 is the patient's right (left in the picture), +1 the left."""
    return -1 if rng.random() < 0.55 else 1


def dome_of(g, side):
    """Height of a hemidiaphragm."""
    return g.dome[(side + 1) // 2]


def deform(g, finding, rng, strength):
    """What a finding does to the shape of the chest, before anything is drawn."""
    mild = min(strength, 1.5)
    if finding == "Cardiomegaly":
        g.ctr = max(g.ctr, 0.505) + 0.06 * strength
    elif finding == "Emphysema":
        g.dome += 0.05 * strength
        g.angle *= 1 - 0.5 * mild
        g.ctr *= 1 - 0.12 * mild
        g.depth += 0.05 * strength
        g.markings *= 1 - 0.4 * mild
    elif finding == "Fibrosis":
        g.dome -= 0.03 * strength
        g.width *= 1 - 0.03 * strength
    elif finding == "Atelectasis":
        g.dome[(side_of(rng) + 1) // 2] -= 0.04 * strength
    elif finding == "Edema":
        g.ctr += 0.015 * strength
        g.markings *= 1 + 0.35 * strength


def spot(film, side, height, across):
    """A point of the lung: height 0 (apex) to 1 (dome), across 0 (mediastinum) to 1 (chest wall)."""
    g = film.g
    v = g.top + height * (dome_of(g, side) - g.top)
    lateral, medial = edges(g, v)
    if side > 0 and height > 0.6:
        medial = max(medial, g.ctr * g.width)  # beside the heart, not behind it
    return side * (medial + across * (lateral - medial)), v


def atelectasis(film, rng, strength):
    side = side_of(rng)
    plates = np.zeros_like(film.v)
    for _ in range(rng.integers(1, 4)):
        x, y = spot(film, side, rng.uniform(0.72, 0.93), rng.uniform(0.3, 0.65))
        length, thickness = rng.uniform(0.07, 0.12), rng.uniform(0.009, 0.018)
        disc = film.disc(x, y, length, thickness, tilt=rng.uniform(-0.4, 0.4))
        plates = np.maximum(plates, soft(1.1 - disc, 0.5))
    below = film.v - dome_of(film.g, side) + 0.1 + 0.5 * (film.a - 0.1)
    loss = soft(below, 0.05) * film.side(side)
    loss *= rng.uniform(0.2, 0.7)
    opacity = 0.75 * strength * np.maximum(plates, loss)
    return [film.fill(np.clip(opacity, 0, 0.95))]


def cardiomegaly(film, rng, strength):
    return [film.heart]


def effusion(film, rng, strength):
    g = film.g
    sides = (-1, 1) if rng.random() < 0.3 else (side_of(rng),)
    size, regions = rng.uniform(0.6, 1.2), []
    for side in sides:
        level = dome_of(g, side) + g.angle * 0.5 - 0.13 * strength * size
        outwards = np.clip((film.a - 0.14) / (g.width - 0.14), 0, 1)
        surface = level - 0.16 * outwards**2 * min(strength, 1.2)  # it climbs the chest wall
        fluid = soft(film.v - surface, 0.022)
        regions.append(film.fill(0.93 * fluid * film.side(side)))
    return regions


def infiltration(film, rng, strength):
    side, region = side_of(rng), 0
    for k in range(rng.integers(1, 4)):
        its_side = side if k < 2 else -side
        x, y = spot(film, its_side, rng.uniform(0.35, 0.9), rng.uniform(0.15, 0.7))
        region = region + film.glow(x, y, rng.uniform(0.07, 0.12))
    grains = cloud(rng, film.size, 18) + 0.5 * cloud(rng, film.size, 9)
    patches = soft(grains + 0.4, 1.3)
    opacity = 0.75 * strength * np.minimum(region, 1)
    opacity *= patches
    return [film.fill(np.clip(opacity, 0, 0.8))]


def _ball(film, x, y, radius, rng, *, lobes, edge):
    """A nearly round body, 0..1; `lobes` is how uneven its border is."""
    angle = np.arctan2(film.v - np.float32(y), film.u - np.float32(x))
    three, five = rng.uniform(0, 6), rng.uniform(0, 6)
    wobble = 1 + lobes * np.sin(3 * angle + three) + 0.6 * lobes * np.sin(5 * angle + five)
    return soft(1 - np.sqrt(film.disc(x, y, radius)) / wobble, edge)


def mass(film, rng, strength):
    x, y = spot(film, side_of(rng), rng.uniform(0.2, 0.85), rng.uniform(0.2, 0.75))
    body = _ball(film, x, y, rng.uniform(0.05, 0.085), rng, lobes=0.07, edge=0.22)
    return [film.fill(min(0.25 + 0.6 * strength, 0.95) * body)]


def nodule(film, rng, strength):
    regions = []
    for _ in range(1 + (rng.random() < 0.35) + 2 * (rng.random() < 0.15)):
        x, y = spot(film, side_of(rng), rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.8))
        ball = _ball(film, x, y, rng.uniform(0.024, 0.038), rng, lobes=0.03, edge=0.3)
        film.extra += 0.05 * strength * ball * film.lung
        regions.append(film.fill(min(0.15 + 0.65 * strength, 0.95) * ball))
    return regions


def pneumonia(film, rng, strength):
    side = side_of(rng)
    x, y = spot(film, side, rng.uniform(0.5, 0.85), rng.uniform(0.25, 0.55))
    disc = film.disc(x, y, rng.uniform(0.09, 0.13), rng.uniform(0.08, 0.12), tilt=0.3)
    focus = soft(1.2 - disc + 0.3 * cloud(rng, film.size, 10), 0.9)
    # Seven bronchi from the hilum to the focus, which stay filled with air.
    hilum = np.array([side * 0.08, 0.43])
    ends = np.array([[x, y]]) + rng.normal(0, 0.045, (7, 2))
    steps = np.linspace(0.25, 1.15, 5)[None, :, None]
    paths = hilum + steps * (ends[:, None] - hilum)
    bronchi = film.strokes(paths, np.full((7, 4), 0.009), [1.0] * 7)
    opacity = np.clip(0.8 * strength * focus, 0, 0.9)
    opacity *= 1 - 0.75 * bronchi
    return [film.fill(opacity)]


def pneumothorax(film, rng, strength):
    side, g, v = side_of(rng), film.g, film.v
    width = 0.02 + 0.06 * strength * rng.uniform(0.7, 1.2)  # of the gap at the apex
    inset = width * (1 - 0.75 * soft(v - 0.45, 0.3))
    lateral, _ = edges(g, v, inset)
    across, down = lateral - film.a, 0.8 * (v - g.top - 1.7 * inset)
    depth = 0.5 * (across + down - np.hypot(across - down, 0.05))  # a rounded minimum
    thin = max(0.006, 0.8 / film.size)  # thickness of the pleura
    here = film.side(side)
    gas = (1 - soft(depth, thin)) * film.lung * here
    film.vessels *= 1 - gas
    pleura = 0.10 * min(0.5 + strength, 1.3) * bell(depth, 0, thin)
    pleura *= film.lung
    pleura *= here
    film.extra += pleura
    film.extra -= 0.10 * min(0.3 + strength, 1.4) * gas
    film.fill(0.12 * strength * film.lung * here * (1 - gas))
    return [gas]


def consolidation(film, rng, strength):
    side, kind = side_of(rng), rng.integers(3)
    v, a = film.v, film.a
    fissure = FISSURE + 0.1 * (a - 0.2) + 0.015 * rng.normal()
    sharp, blurred = 0.006, 0.06
    if kind == 0:  # upper lobe above the horizontal fissure
        lobe = soft(fissure - v, sharp)
        lobe *= soft(v - fissure + rng.uniform(0.12, 0.25), blurred)
    elif kind == 1:  # middle lobe or lingula below it
        lobe = soft(v - fissure, sharp)
        lobe *= soft(fissure + rng.uniform(0.12, 0.18) - v, blurred)
    else:  # lower lobe
        lobe = soft(v - fissure - 0.14 + 0.2 * a, blurred)
        lobe *= soft(a - 0.1, 0.05)
    lobe *= film.side(side)
    lobe *= soft(a - rng.uniform(0.05, 0.12), 0.05)
    lobe *= 0.92 + 0.08 * cloud(rng, film.size, 8)
    return [film.fill(np.clip((0.2 + 0.75 * strength) * lobe, 0, 0.95))]


def edema(film, rng, strength):
    wings = np.exp(-(((film.a - 0.13) / 0.085) ** 2) - ((film.v - 0.46) / 0.15) ** 2)
    grains = 1 + 0.2 * cloud(rng, film.size, 14)
    haze = np.clip(0.65 * strength * wings * grains, 0, 0.9)
    # Kerley's lines: eight short ones at each chest wall, above the diaphragm.
    side = np.repeat([-1.0, 1.0], 8)
    y = min(film.g.dome) + rng.uniform(-0.13, 0.06, 16)
    lateral, _ = edges(film.g, y)
    ends = [np.stack([side * (lateral - inset), y], -1) for inset in (0.008, 0.055)]
    lines = film.strokes(np.stack(ends, 1), np.full((16, 1), 0.005), [1.0] * 16)
    film.extra += 0.10 * min(strength, 1.3) * lines * film.lung
    return [film.fill(haze)]


def emphysema(film, rng, strength):
    for _ in range(3):  # bullae: round, without vessels
        x, y = spot(film, side_of(rng), rng.uniform(0.1, 0.5), rng.uniform(0.4, 0.85))
        disc = film.disc(x, y, rng.uniform(0.04, 0.075))
        film.vessels *= 1 - min(strength, 1) * soft(1 - disc, 0.15)
        film.extra += 0.04 * strength * soft(0.12 - np.abs(disc - 1), 0.12) * film.lung
    return [film.lung]


def fibrosis(film, rng, strength):
    low, lateral = soft(film.v - 0.45, 0.2), soft(film.a - 0.2, 0.08)
    where = low * (0.35 + 0.65 * lateral) * film.lung
    fine = bell(cloud(rng, film.size, 44), 0, 0.35)
    net = fine + 0.8 * bell(cloud(rng, film.size, 26), 0, 0.25)
    film.extra += 0.17 * strength * where * (net - 0.3)
    film.fill(np.clip(0.2 * strength * where, 0, 0.6))
    return [where]


def pleural_thickening(film, rng, strength):
    side, v, top = side_of(rng), film.v, film.g.top
    begin = rng.uniform(0.0, 0.3)  # below the apex
    thickness = rng.uniform(0.022, 0.036) * (0.6 + 0.5 * min(strength, 1.5))
    thickness = thickness * (1 + 0.4 * np.sin(v * 40 + rng.uniform(0, 6)))
    span = soft(v - top - begin + 0.04, 0.05)
    span *= soft(top + begin + rng.uniform(0.2, 0.4) - v, 0.06)
    depth = np.minimum(film.lateral - film.a, (v - top) * 0.9)
    rind = soft(thickness - depth, 0.007)
    rind *= span
    rind *= film.side(side)
    film.extra += 0.11 * strength * rind * film.lung
    return [film.fill(np.clip((0.35 + 0.6 * strength) * rind, 0, 0.95))]


def hernia(film, rng, strength):
    radius = rng.uniform(0.1, 0.14) * (0.8 + 0.25 * min(strength, 1.5))
    # Most of the stomach lies in the chest.
    x, y = rng.uniform(-0.02, 0.06), film.g.dome[1] - 0.8 * radius
    disc = film.disc(x, y, radius, radius * 0.9)
    sac, wall = soft(1 - disc, 0.15), soft(0.2 - np.abs(disc - 1), 0.2)
    level = y - 0.1 * radius  # of the fluid, with gas above it
    gas, density = soft(0.85 - disc, 0.2), min(0.7 + 0.5 * strength, 1.4)
    film.fill(0.8 * sac)
    film.extra += density * (0.08 * sac + 0.03 * wall)
    bubble = 0.26 * density * gas
    bubble *= soft(level - film.v, 0.006)
    film.extra -= bubble
    return [sac]


SIGNS = {finding: globals()[finding.lower()] for finding in FINDINGS}
