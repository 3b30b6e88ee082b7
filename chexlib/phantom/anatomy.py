"""Draws the normal anatomy of a synthetic frontal chest radiograph.

Coordinates are the patient's: u runs across the film from the midline (positive on the right of the
picture, the patient's left), v runs down it, both in units of the picture's side. Lung is air: a
finding that fills it (`Film.fill`) takes away air, and with it vessels and borders, as on a real
film (the silhouette sign). Dimensions and contrasts are set by eye; no radiograph is part of a
picture.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw


def soft(x, width):
    """0 below -width, 1 above width, smooth between."""
    t = x * np.float32(0.5 / width)
    t += np.float32(0.5)
    # Two calls, yet a third of the time of np.clip: this runs fifty times an image.
    np.maximum(t, 0, out=t)
    np.minimum(t, 1, out=t)
    slope = t * -2
    slope += 3
    slope *= t
    slope *= t
    return slope


@cache
def _pixels(size):
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return np.meshgrid(axis, axis)


def cloud(rng, size, cells):
    """A smooth random field, float32 (size, size), about unit variance, with `cells` grains across."""
    grains = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(grains.resize((size, size), Image.Resampling.BICUBIC)) * np.float32(1.3)


def anatomy(d, rng):
    """Shape of one patient, the same for every film.

    Lengths are fractions of the picture's side.
    """
    n = np.clip(rng.standard_normal(12), -2.2, 2.2)
    male, old = d.sex == "M", (d.age - 46) / 17
    dome = 0.665 + 0.022 * n[1]
    return SimpleNamespace(
        width=0.322 + 0.014 * n[0] + 0.006 * male,  # half of the inner width of the thorax
        top=0.125 + 0.012 * n[2] + 0.005 * old,
        dome=np.array([dome, dome + 0.022 + 0.008 * n[3]]),  # right, left hemidiaphragm
        angle=0.105 + 0.012 * n[4],  # depth of the costophrenic angles below the domes
        ctr=np.clip(0.425 + 0.025 * n[5] + 0.006 * old, 0.36, 0.485),  # cardiothoracic ratio
        knob=0.031 + 0.004 * old + 0.003 * n[6],
        trunk=0.44 + 0.03 * n[7] + 0.015 * male,
        breast=0.0 if male else max(0.2, 1 + 0.4 * n[8]),
        rib=0.063 + 0.003 * n[9],
        phase=rng.random(2),
        slope=0.9 + 0.12 * n[10],
        bend=0.05 * n[11],
        markings=1 + 0.12 * old,
        stomach=rng.random() < 0.6,
        # Half axes of the stomach bubble.
        bubble=(rng.uniform(0.045, 0.08), rng.uniform(0.02, 0.035)),
        calcified=d.age > 62 and rng.random() < 0.5,
        depth=0.37,  # how much darker air is than soft tissue
    )


def posture(g, d, rng, variation):
    """How this film was taken: projection, breath, tilt of the patient. Changes `g`."""
    ap = d.view == "AP"
    g.ap, g.clavicle, g.scapula = ap, 0.205 - 0.03 * ap + 0.008 * rng.normal(), 0.335 - 0.055 * ap
    g.dome += 0.01 * rng.normal() - 0.035 * ap
    g.ctr = min(g.ctr * (1 + 0.1 * ap) + 0.008 * variation * rng.normal(), 0.54 if ap else 0.49)
    spread = 1.5 if ap else 1.0
    g.tilt, g.zoom = (
        np.radians(1.5 * spread * rng.normal()),
        float(np.exp(0.045 * spread * rng.normal())),
    )
    g.shift = 0.018 * spread * rng.normal(size=2)


def edges(g, v, inset=0.0):
    """Lateral and medial border of the lung at height v; `inset` shrinks it away from the chest
    wall.
    """
    top = g.top + 1.5 * inset
    q = np.clip((v - top) / 0.45, 0, 1)
    m = np.clip((v - top) / 0.13, 0, 1)
    apex = 0.145
    low = np.clip((v - 0.62) / 0.25, 0, 1)
    lateral = apex + (g.width - inset - apex) * np.power(q * (2 - q), 0.62) - 0.02 * low * low
    return lateral, apex - (apex - 0.052) * np.sqrt(m * (2 - m))


class Film:
    """The film while it is drawn: grids, lung, heart and what lies in them, float32 (size, size)."""

    def __init__(self, g, size):
        # NumPy's own float64 scalars would make every array float64.
        for name, value in vars(g).items():
            setattr(
                g, name, value.tolist() if isinstance(value, np.floating | np.ndarray) else value
            )
        self.g, self.size = g, size
        x, y = _pixels(size)
        x, y = (x - np.float32(g.shift[0])) / g.zoom, (y - np.float32(g.shift[1])) / g.zoom
        c, s = np.cos(g.tilt), np.sin(g.tilt)
        self.v = (c * y - s * x + 0.5).astype(np.float32)
        self.u = (c * x + s * y - g.bend * (self.v - 0.4) ** 2).astype(np.float32)
        self.a = np.abs(self.u)
        self.left = self.u > 0
        self.lateral, self.medial = edges(g, self.v)
        dome = np.where(self.left, np.float32(g.dome[1]), np.float32(g.dome[0]))
        d = self.a - 0.16
        self.floor = dome + np.where(
            d > 0, g.angle * (np.abs(d) / (g.width - 0.16)) ** 2.6, 0.03 * (d / 0.16) ** 2
        ).astype(np.float32)
        self.wall = soft(self.lateral - self.a, 0.012) * soft(self.v - g.top, 0.02)
        self.lung = self.wall * soft(self.a - self.medial, 0.012) * soft(self.floor - self.v, 0.01)
        right, base = 0.078 + 0.25 * max(g.ctr - 0.45, 0) * g.width, g.dome[1] - 0.01
        t = np.clip((self.v - 0.35) / (base - 0.35), 0, 1.4)
        round_off = np.sqrt(np.clip(1 - (np.maximum(t - 1, 0) / 0.4) ** 2, 0, 1))
        reach = 2 * g.width * g.ctr - right
        out = 0.045 + (reach - 0.045) * np.sin(np.minimum(t, 1) * np.float32(np.pi / 2)) ** 1.4
        back = 0.048 + (right - 0.048) * np.sin(
            np.clip((self.v - 0.42) / 0.3, 0, 1) * np.float32(np.pi)
        )
        self.heart = soft(out * round_off - self.u, 0.014) * soft(self.u + back, 0.014)
        self.heart *= soft(self.v - 0.3, 0.05) * soft(base + 0.1 - self.v, 0.06)
        self.air = self.lung * (1 - 0.9 * self.heart)
        self.vessels = np.ones_like(self.air)
        self.extra = np.zeros_like(self.air)  # density of signs, inside the body
        self.over = np.zeros_like(self.air)  # density of what lies on the patient

    def disc(self, x, y, rx, ry=None, tilt=0.0):
        """Squared distance from (x, y) in units of the radii: below 1 inside the ellipse."""
        dx, dy = self.u - np.float32(x), self.v - np.float32(y)
        if tilt:
            c, s = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
            dx, dy = c * dx + s * dy, c * dy - s * dx
        return (dx * np.float32(1 / rx)) ** 2 + (dy * np.float32(1 / (ry or rx))) ** 2

    def fill(self, opacity):
        """Replace this fraction of the air; returns the part that lies in lung."""
        self.air *= 1 - opacity
        self.vessels *= 1 - opacity
        return opacity * self.lung

    def strokes(self, paths, widths, values):
        """Tapering lines, 0..1: paths (n, points, 2) in (u, v), widths (n, points - 1), values
        (n,).
        """
        g, k = self.g, 2 if self.size >= 128 else 4
        scale = self.size * k
        u, v = paths[..., 0] + g.bend * (paths[..., 1] - 0.4) ** 2, paths[..., 1] - 0.5
        c, s = np.cos(g.tilt), np.sin(g.tilt)
        x = ((c * u - s * v) * g.zoom + g.shift[0] + 0.5) * scale
        y = ((s * u + c * v) * g.zoom + g.shift[1] + 0.5) * scale
        points = np.stack([x, y], -1).reshape(len(paths), -1).tolist()
        wide = widths * scale * g.zoom
        fills = (
            np.minimum(255 * np.asarray(values)[:, None] * np.minimum(wide, 1), 255)
            .astype(int)
            .tolist()
        )
        canvas = Image.new("L", (scale, scale))
        # `line` without its look at the colour, half of its time.
        draw = ImageDraw.Draw(canvas).draw.draw_lines
        for xy, row, fill in zip(
            points, np.maximum(1, np.rint(wide)).astype(int).tolist(), fills, strict=True
        ):
            for j, width in enumerate(row):
                draw(xy[2 * j : 2 * j + 4], fill[j], width)
        return np.asarray(canvas.reduce(k), dtype=np.float32) / 255


def _vessels(f, rng):
    """Arteries and veins: tapering branches from both hila, and their side branches."""
    g, mains = f.g, 13
    side = np.repeat([-1.0, 1.0], mains)
    angle = np.tile(np.linspace(-1.25, 1.35, mains), 2) + 0.12 * rng.standard_normal(2 * mains)
    length = (0.2 + 0.05 * rng.standard_normal(2 * mains)) * (1 + 0.35 * np.abs(np.sin(angle)))
    bend = 0.16 * rng.standard_normal((2 * mains, 6))
    heading = angle[:, None] + np.cumsum(bend, 1)
    step = (
        np.stack([side[:, None] * np.cos(heading), np.sin(heading)], -1)
        * (length / 6)[:, None, None]
    )
    start = np.stack([side * 0.075, 0.42 + 0.05 * np.sin(angle)], -1)[:, None]
    trunk = start + np.concatenate([np.zeros_like(step[:, :1]), np.cumsum(step, 1)], 1)
    taper = g.markings * np.array([0.015, 0.0125, 0.0095, 0.007, 0.0045, 0.003])
    first = f.strokes(trunk, np.tile(taper, (2 * mains, 1)), rng.uniform(0.6, 1, 2 * mains))
    root = trunk[:, 1:6].reshape(-1, 1, 2)
    heading = heading[:, 1:].reshape(-1) + rng.choice([-1, 1], root.shape[0]) * rng.uniform(
        0.4, 0.9, root.shape[0]
    )
    heading = heading[:, None] + np.cumsum(0.2 * rng.standard_normal((len(root), 3)), 1)
    step = np.stack([np.repeat(side, 5)[:, None] * np.cos(heading), np.sin(heading)], -1) * 0.032
    twig = root + np.concatenate([np.zeros_like(step[:, :1]), np.cumsum(step, 1)], 1)
    second = f.strokes(
        twig,
        np.tile(g.markings * np.array([0.0055, 0.004, 0.002]), (len(root), 1)),
        [0.75] * len(root),
    )
    return np.maximum(first, second)


def _ribs(f):
    """Posterior arcs, convex upwards, and the fainter anterior ones that cross them."""
    g = f.g
    r = f.a / np.float32(g.width)
    phase = np.where(f.left, np.float32(g.phase[1] * 0.3), np.float32(g.phase[0] * 0.3))
    back = (
        f.v + np.float32(0.05 * g.slope) * (4 * r * (1 - r)) - np.float32(0.16 * g.slope) * r**3
    ) / g.rib
    front = (f.v + np.float32(0.24) * r - np.float32(0.02)) / np.float32(g.rib * 1.12)
    cage = soft(f.lateral + 0.025 - f.a, 0.012) * soft(f.v - g.top + 0.02, 0.02)
    total = np.zeros_like(f.v)
    for turns, low, weight, reach in (
        (back, 0.25, 1.0, soft(0.93 - r, 0.12) + 0.35),
        (front, 0.35, 0.75, soft(r - 0.45, 0.15)),
    ):
        wave = np.cos(np.float32(2 * np.pi) * (turns + phase))
        bar = soft(wave - low, 0.35)
        total += weight * reach * (0.62 * bar + 1.5 * bar * (1 - bar))
    return total * cage * soft(f.floor + 0.03 - f.v, 0.08) * soft(f.a - 0.04, 0.012)


def expose(f, rng, patient_rng):
    """The film before noise: 0 is black (air, background), 1 white.

    Adds up what the beam goes through.
    """
    g, u, v, a = f.g, f.u, f.v, f.a
    shoulder = 0.03 + 0.13 * soft(a - 0.27, 0.17) - 0.5 * soft(0.095 - a, 0.05)
    trunk = g.trunk + 0.12 * np.exp(-(((v - 0.28) / 0.17) ** 2)) + 0.02 * soft(v - 0.8, 0.3)
    body = soft(v - shoulder, 0.03) * soft(trunk - a, 0.025)
    belly = soft(v - f.floor + 0.06, 0.16) * (1 - 1.6 * a * a)
    film = 0.5 + 0.07 * soft(v - 0.2, 0.2) + 0.24 * belly - 0.1 * soft(a - trunk + 0.07, 0.07)
    film += 0.09 * np.exp(-((u / 0.075) ** 2)) * soft(v - 0.05, 0.1) + 0.075 * f.heart * soft(
        v - 0.44, 0.14
    )
    film += 0.075 * soft(1 - f.disc(0.048, g.top + 0.185, g.knob, g.knob * 1.25), 0.5)
    film += 0.08 * np.exp(-f.disc(0.075, 0.4, 0.035, 0.05)) + 0.08 * np.exp(
        -f.disc(-0.075, 0.43, 0.035, 0.055)
    )
    if g.breast:
        for side in (-1, 1):
            film += (
                0.085
                * g.breast
                * np.sqrt(
                    np.clip(1 - f.disc(side * 0.215, 0.64 + 0.04 * g.breast, 0.145, 0.135), 0, 1)
                )
            )
    deep = 0.72 + 0.28 * soft(f.lateral - a - 0.05, 0.06) - 0.1 * soft(v - 0.6, 0.12)
    film -= np.float32(g.depth) * f.air * deep
    windpipe = soft(0.017 - np.abs(u + 0.004), 0.007) * soft(0.36 - v, 0.02)
    bronchi = soft(0.01 - np.abs(v - 0.355 - 0.55 * a), 0.006) * soft(0.085 - a, 0.02)
    film -= 0.075 * np.maximum(windpipe, 0.35 * bronchi) * body
    bones = 0.066 * _ribs(f) * (1 - 0.55 * f.heart)
    bones += 0.035 * soft(0.03 - a, 0.008) * (1 + 0.35 * np.cos(v * np.float32(2 * np.pi / 0.047)))
    run = (a - 0.03) / 0.25
    collar = g.clavicle - 0.05 * run + 0.016 * np.sin(run * np.float32(6.3)) + 0.012 * g.ap * run
    bar = soft(0.014 - np.abs(v - collar), 0.007) * soft(a - 0.03, 0.01) * soft(0.33 - a, 0.03)
    bones += 0.09 * bar * (1 + 0.5 * (1 - bar))
    blade = g.scapula + 0.12 * (v - 0.2) - 0.6 * np.clip(v - 0.36, 0, 1)
    bones += (
        0.055
        * soft(a - blade, 0.008)
        * soft(v - 0.14, 0.03)
        * soft(0.46 - v, 0.05)
        * soft(blade + 0.12 - a, 0.06)
    )
    humerus = ((a - 0.435) / 0.05) ** 2 + ((v - 0.2) / 0.055) ** 2
    shaft = (
        soft(0.026 - np.abs(a - 0.45 - 0.12 * (v - 0.2)), 0.01)
        * soft(v - 0.2, 0.02)
        * soft(0.5 - v, 0.1)
    )
    bones += 0.09 * np.maximum(soft(1 - humerus, 0.3), 0.8 * shaft)
    film += bones
    film += 0.17 * _vessels(f, patient_rng) * f.air * f.vessels * soft(0.24 - a, 0.16)
    film += 0.011 * cloud(rng, f.size, 48) * f.air * f.vessels
    if g.calcified:
        ring = f.disc(0.048, g.top + 0.185, g.knob * 0.9)
        film += 0.08 * soft(0.18 - np.abs(ring - 1), 0.12) * soft(g.top + 0.19 - v, 0.02)
    if g.stomach:
        bubble = soft(1 - f.disc(0.15, g.dome[1] + 0.045, *g.bubble, tilt=-0.1), 0.6)
        film -= 0.15 * bubble * soft(v - f.floor - 0.012, 0.008)
    return (film + f.extra + 0.04 * cloud(rng, f.size, 3)) * body + f.over
