"""Draws the normal anatomy of a synthetic frontal chest radiograph.

Coordinates are the patient's: u runs across the film from the midline (positive on the right of the
picture, the patient's left), v runs down it, both in units of the picture's side; a is |u|. All
lengths are in these units, all densities in units of the grey scale, 0 black to 1 white. Lung is
air: a finding that fills it (`Film.fill`) takes away air, and with it vessels and borders, as on a
real film (the silhouette sign). Dimensions and contrasts are set by eye; no radiograph is part of a
picture.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

HILUM = 0.42  # height of the roots of the lungs
KNOB = 0.048  # distance of the aortic knob from the midline
MAIN_VESSELS = 13  # of each lung
MAIN_WIDTHS = np.array([0.015, 0.0125, 0.0095, 0.007, 0.0045, 0.003])  # from the hilum outwards
TWIG_WIDTHS = np.array([0.0055, 0.004, 0.002])


def soft(x, width):
    """0 below -width, 1 above width, smooth between."""
    t = x * (0.5 / width)
    t += 0.5
    # Two calls, yet a third of the time of np.clip: this runs fifty times an image.
    np.maximum(t, 0, out=t)
    np.minimum(t, 1, out=t)
    slope = t * -2
    slope += 3
    slope *= t
    slope *= t
    return slope


def bell(x, middle, width):
    """A Gaussian, 1 at `middle` and 1/e at a distance of `width`."""
    return np.exp(-(((x - middle) / width) ** 2))


@cache
def _pixels(size):
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return np.meshgrid(axis, axis)


def cloud(rng, size, cells):
    """A smooth random field, float32 (size, size), about unit variance, with `cells` grains across."""
    grains = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(grains.resize((size, size), Image.Resampling.BICUBIC)) * np.float32(1.3)


def anatomy(d, rng):
    """Shape of one patient, the same for every film."""
    people = iter(np.clip(rng.standard_normal(12), -2.2, 2.2))
    male, old = d.sex == "M", (d.age - 46) / 17

    def about(mean, deviation):
        return mean + deviation * next(people)

    g = SimpleNamespace()
    g.width = about(0.322, 0.014) + 0.006 * male  # half of the inner width of the thorax
    right_dome = about(0.665, 0.022)
    g.top = about(0.125, 0.012) + 0.005 * old
    g.dome = np.array([right_dome, about(right_dome + 0.022, 0.008)])  # height of each diaphragm
    g.angle = about(0.105, 0.012)  # depth of the costophrenic angles below the domes
    g.ctr = np.clip(about(0.425, 0.025) + 0.006 * old, 0.36, 0.485)  # cardiothoracic ratio
    g.knob = about(0.031 + 0.004 * old, 0.003)  # radius of the aortic knob
    g.trunk = about(0.44, 0.03) + 0.015 * male
    breast = max(0.2, about(1, 0.4))
    g.breast = 0.0 if male else breast  # 1 is of mean size
    g.rib = about(0.063, 0.003)  # from one rib to the next
    g.phase = rng.random(2)  # of the ribs, right and left
    g.slope = about(0.9, 0.12)  # of the ribs, 1 is steep
    g.bend = about(0.0, 0.05)  # of the spine
    g.markings = 1 + 0.12 * old  # width of the vessels, 1 is at 46 years
    g.stomach = rng.random() < 0.6
    g.bubble = rng.uniform(0.045, 0.08), rng.uniform(0.02, 0.035)  # half axes of its gas
    g.calcified = d.age > 62 and rng.random() < 0.5
    g.depth = 0.37  # how much darker air is than soft tissue
    return g


def posture(g, d, rng, variation):
    """How this film was taken: projection, breath, tilt of the patient. Changes `g`."""
    ap = d.view == "AP"
    g.ap = ap
    g.clavicle = 0.205 - 0.03 * ap + 0.008 * rng.normal()
    g.scapula = 0.335 - 0.055 * ap
    g.dome += 0.01 * rng.normal() - 0.035 * ap
    enlarged = g.ctr * (1 + 0.1 * ap)  # a heart far from the detector
    g.ctr = min(enlarged + 0.008 * variation * rng.normal(), 0.54 if ap else 0.49)
    spread = 1.5 if ap else 1.0
    g.tilt = np.radians(1.5 * spread * rng.normal())
    g.zoom = float(np.exp(0.045 * spread * rng.normal()))
    g.shift = 0.018 * spread * rng.normal(size=2)


def edges(g, v, inset=0.0):
    """Lateral and medial border of the lung at height v; `inset` shrinks it away from the chest
    wall.
    """
    top, apex = g.top + 1.5 * inset, 0.145
    below = v - top
    q = np.clip(below / 0.45, 0, 1)
    m = np.clip(below / 0.13, 0, 1)
    low = np.clip((v - 0.62) / 0.25, 0, 1)
    widening = np.power(q * (2 - q), 0.62)
    lateral = apex + (g.width - inset - apex) * widening - 0.02 * low * low
    narrowing = np.sqrt(m * (2 - m))
    return lateral, apex - (apex - 0.052) * narrowing


class Film:
    """The film while it is drawn: grids, lung, heart and what lies in them, float32 (size, size)."""

    def __init__(self, g, size):
        # NumPy's own float64 scalars would make every array float64.
        for name, value in vars(g).items():
            if isinstance(value, np.floating | np.ndarray):
                setattr(g, name, value.tolist())
        self.g, self.size = g, size
        x, y = _pixels(size)
        x = (x - g.shift[0]) / g.zoom
        y = (y - g.shift[1]) / g.zoom
        c, s = np.cos(g.tilt), np.sin(g.tilt)
        v = (c * y - s * x + 0.5).astype(np.float32)
        u = (c * x + s * y - g.bend * (v - 0.4) ** 2).astype(np.float32)
        a = np.abs(u)
        self.u, self.v, self.a, self.left = u, v, a, u > 0
        self.lateral, self.medial = edges(g, v)
        right_dome, left_dome = np.float32(g.dome)
        d = a - 0.16  # from the highest place of a dome
        fall = g.angle * (np.abs(d) / (g.width - 0.16)) ** 2.6
        rise = 0.03 * (d / 0.16) ** 2
        self.floor = np.where(self.left, left_dome, right_dome) + np.where(d > 0, fall, rise)
        self.wall = soft(self.lateral - a, 0.012)
        self.wall *= soft(v - g.top, 0.02)
        self.lung = self.wall * soft(a - self.medial, 0.012)
        self.lung *= soft(self.floor - v, 0.01)
        self.heart = _heart(g, u, v)
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

    def ellipse(self, x, y, rx, ry=None, *, edge, tilt=0.0):
        """1 inside an ellipse, 0 outside, with an edge that is so soft (in squared radii)."""
        return soft(1 - self.disc(x, y, rx, ry, tilt), edge)

    def glow(self, x, y, rx, ry=None):
        """A Gaussian spot: 1 in its middle, 1/e at the radii."""
        return np.exp(-self.disc(x, y, rx, ry))

    def side(self, side):
        """1 in one half of the patient: -1 is the patient's right, +1 the left."""
        return soft(side * self.u, 0.02)

    def fill(self, opacity):
        """Replace this fraction of the air; returns the part that lies in lung."""
        self.air *= 1 - opacity
        self.vessels *= 1 - opacity
        return opacity * self.lung

    def strokes(self, paths, widths, values):
        """Tapering lines, 0..1: paths (n, points, 2) in (u, v), widths (n, points - 1), values
        (n,).
        """
        g, oversampling = self.g, 2 if self.size >= 128 else 4
        scale = self.size * oversampling
        u, v = np.moveaxis(paths, -1, 0)
        u, v = u + g.bend * (v - 0.4) ** 2, v - 0.5
        c, s = np.cos(g.tilt), np.sin(g.tilt)
        across, down = c * u - s * v, s * u + c * v
        x = (across * g.zoom + g.shift[0] + 0.5) * scale
        y = (down * g.zoom + g.shift[1] + 0.5) * scale
        points = np.stack([x, y], -1).reshape(len(paths), -1).tolist()
        pixels = widths * scale * g.zoom
        # A line thinner than a pixel is drawn one pixel wide, and fainter.
        greys = 255 * np.asarray(values)[:, None] * np.minimum(pixels, 1)
        greys = np.minimum(greys, 255).astype(int).tolist()
        pixels = np.maximum(1, np.rint(pixels)).astype(int).tolist()
        canvas = Image.new("L", (scale, scale))
        # `line` without its look at the colour, half of its time.
        draw = ImageDraw.Draw(canvas).draw.draw_lines
        for xy, line_greys, line_widths in zip(points, greys, pixels, strict=True):
            for j, width in enumerate(line_widths):
                draw(xy[2 * j : 2 * j + 4], line_greys[j], width)
        return np.asarray(canvas.reduce(oversampling), dtype=np.float32) / 255


def _heart(g, u, v):
    """The heart with its great vessels, 0..1."""
    right = 0.078 + 0.25 * max(g.ctr - 0.45, 0) * g.width  # from the midline to its right border
    left = 2 * g.width * g.ctr - right
    base = g.dome[1] - 0.01
    t = np.clip((v - 0.35) / (base - 0.35), 0, 1.4)  # 0 at the pulmonary trunk, 1 at the diaphragm
    below = (np.maximum(t - 1, 0) / 0.4) ** 2
    apex = np.sqrt(np.clip(1 - below, 0, 1))
    bulge = np.sin(np.minimum(t, 1) * np.float32(np.pi / 2)) ** 1.4
    left_border = (0.045 + (left - 0.045) * bulge) * apex
    down = np.clip((v - 0.42) / 0.3, 0, 1)
    right_border = 0.048 + (right - 0.048) * np.sin(down * np.float32(np.pi))
    heart = soft(left_border - u, 0.014)
    heart *= soft(u + right_border, 0.014)
    heart *= soft(v - 0.3, 0.05) * soft(base + 0.1 - v, 0.06)
    return heart


def _branches(start, heading, side, length):
    """Points (n, steps + 1, 2) of lines from `start` (n, 1, 2), which turn as `heading` (n, steps)
    says, mirrored where `side` is -1; `length` of each step.
    """
    steps = np.stack([side[:, None] * np.cos(heading), np.sin(heading)], -1) * length
    begin = np.zeros_like(steps[:, :1])
    return start + np.concatenate([begin, np.cumsum(steps, 1)], 1)


def _vessels(film, rng):
    """Arteries and veins: tapering branches from both hila, and their side branches."""
    markings, n = film.g.markings, 2 * MAIN_VESSELS
    side = np.repeat([-1.0, 1.0], MAIN_VESSELS)
    fan = np.linspace(-1.25, 1.35, MAIN_VESSELS)  # radians below the horizontal
    angle = np.tile(fan, 2) + 0.12 * rng.standard_normal(n)
    length = (0.2 + 0.05 * rng.standard_normal(n)) * (1 + 0.35 * np.abs(np.sin(angle)))
    heading = angle[:, None] + np.cumsum(0.16 * rng.standard_normal((n, 6)), 1)
    start = np.stack([side * 0.075, HILUM + 0.05 * np.sin(angle)], -1)[:, None]
    mains = _branches(start, heading, side, (length / 6)[:, None, None])
    widths = np.tile(markings * MAIN_WIDTHS, (n, 1))
    drawn = film.strokes(mains, widths, rng.uniform(0.6, 1, n))
    # A twig from each bend of each main vessel.
    roots = mains[:, 1:6].reshape(-1, 1, 2)
    twigs = len(roots)
    turn = rng.choice([-1, 1], twigs) * rng.uniform(0.4, 0.9, twigs)
    heading = heading[:, 1:].reshape(-1) + turn
    heading = heading[:, None] + np.cumsum(0.2 * rng.standard_normal((twigs, 3)), 1)
    paths = _branches(roots, heading, np.repeat(side, 5), 0.032)
    widths = np.tile(markings * TWIG_WIDTHS, (twigs, 1))
    return np.maximum(drawn, film.strokes(paths, widths, [0.75] * twigs))


def _ribs(film):
    """Posterior arcs, convex upwards, and the fainter anterior ones that cross them."""
    g, v, a = film.g, film.v, film.a
    r = a / g.width  # 0 at the midline, 1 at the chest wall
    right_phase, left_phase = np.float32([0.3 * phase for phase in g.phase])
    phase = np.where(film.left, left_phase, right_phase)
    arch, fall = 0.05 * g.slope * (4 * r * (1 - r)), 0.16 * g.slope * r**3
    posterior = (v + arch - fall) / g.rib + phase
    anterior = (v + 0.24 * r - 0.02) / (g.rib * 1.12) + phase
    bones = _bars(posterior, 0.25) * (soft(0.93 - r, 0.12) + 0.35)
    bones += 0.75 * soft(r - 0.45, 0.15) * _bars(anterior, 0.35)
    cage = soft(film.lateral + 0.025 - a, 0.012)
    cage *= soft(v - g.top + 0.02, 0.02)
    bones *= cage
    bones *= soft(film.floor + 0.03 - v, 0.08)
    bones *= soft(a - 0.04, 0.012)
    return bones


def _bars(turns, low):
    """A bar a turn, brighter along its borders; `low` is how narrow it is."""
    bar = soft(np.cos(np.float32(2 * np.pi) * turns) - low, 0.35)
    return 0.62 * bar + 1.5 * bar * (1 - bar)


def _soft_tissue(film):
    """Chest wall, mediastinum, hila, breasts and belly, and where the body is (0..1)."""
    g, u, v, a = film.g, film.u, film.v, film.a
    shoulder = 0.03 + 0.13 * soft(a - 0.27, 0.17)
    shoulder -= 0.5 * soft(0.095 - a, 0.05)  # the neck
    trunk = g.trunk + 0.12 * bell(v, 0.28, 0.17)
    trunk += 0.02 * soft(v - 0.8, 0.3)
    body = soft(v - shoulder, 0.03)
    body *= soft(trunk - a, 0.025)
    belly = soft(v - film.floor + 0.06, 0.16)
    belly *= 1 - 1.6 * a * a
    grey = 0.5 + 0.07 * soft(v - 0.2, 0.2)
    grey += 0.24 * belly
    grey -= 0.1 * soft(a - trunk + 0.07, 0.07)
    spine = 0.09 * bell(u, 0, 0.075)
    spine *= soft(v - 0.05, 0.1)
    grey += spine + 0.075 * film.heart * soft(v - 0.44, 0.14)
    grey += 0.075 * film.ellipse(KNOB, g.top + 0.185, g.knob, g.knob * 1.25, edge=0.5)
    left_hilum = 0.08 * film.glow(0.075, 0.4, 0.035, 0.05)
    grey += left_hilum + 0.08 * film.glow(-0.075, 0.43, 0.035, 0.055)
    if g.breast:
        for side in (-1, 1):
            disc = film.disc(side * 0.215, 0.64 + 0.04 * g.breast, 0.145, 0.135)
            grey += 0.085 * g.breast * np.sqrt(np.clip(1 - disc, 0, 1))
    return grey, body


def _bones(film):
    """Ribs, vertebrae, clavicles, shoulder blades and upper arms."""
    g, v, a = film.g, film.v, film.a
    bones = 0.066 * _ribs(film) * (1 - 0.55 * film.heart)
    discs = np.cos(v * np.float32(2 * np.pi / 0.047))  # a vertebra every 0.047
    bones += 0.035 * soft(0.03 - a, 0.008) * (1 + 0.35 * discs)
    run = (a - 0.03) / 0.25  # along the clavicle
    collar = g.clavicle - 0.05 * run
    collar += 0.016 * np.sin(run * 6.3)
    collar += 0.012 * g.ap * run
    bar = soft(0.014 - np.abs(v - collar), 0.007)
    bar *= soft(a - 0.03, 0.01)
    bar *= soft(0.33 - a, 0.03)
    bones += 0.09 * bar * (1 + 0.5 * (1 - bar))
    blade = g.scapula + 0.12 * (v - 0.2)
    blade -= 0.6 * np.clip(v - 0.36, 0, 1)
    scapula = 0.055 * soft(a - blade, 0.008)
    scapula *= soft(v - 0.14, 0.03)
    scapula *= soft(0.46 - v, 0.05)
    scapula *= soft(blade + 0.12 - a, 0.06)
    bones += scapula
    head = ((a - 0.435) / 0.05) ** 2 + ((v - 0.2) / 0.055) ** 2
    shaft = soft(0.026 - np.abs(a - 0.45 - 0.12 * (v - 0.2)), 0.01)
    shaft *= soft(v - 0.2, 0.02)
    shaft *= soft(0.5 - v, 0.1)
    bones += 0.09 * np.maximum(soft(1 - head, 0.3), 0.8 * shaft)
    return bones


def expose(film, rng, patient_rng):
    """The film before noise: 0 is black (air, background), 1 white.

    Adds up what the beam goes through.
    """
    g, u, v, a = film.g, film.u, film.v, film.a
    grey, body = _soft_tissue(film)
    deep = 0.72 + 0.28 * soft(film.lateral - a - 0.05, 0.06)
    deep -= 0.1 * soft(v - 0.6, 0.12)
    grey -= g.depth * film.air * deep
    windpipe = soft(0.017 - np.abs(u + 0.004), 0.007)
    windpipe *= soft(0.36 - v, 0.02)
    bronchi = soft(0.01 - np.abs(v - 0.355 - 0.55 * a), 0.006)
    bronchi *= soft(0.085 - a, 0.02)
    grey -= 0.075 * np.maximum(windpipe, 0.35 * bronchi) * body
    grey += _bones(film)
    markings = 0.17 * _vessels(film, patient_rng)
    grain = 0.011 * cloud(rng, film.size, 48)
    for texture in (markings, grain):
        texture *= film.air
        texture *= film.vessels
    markings *= soft(0.24 - a, 0.16)
    grey += markings
    grey += grain
    if g.calcified:
        ring = film.disc(KNOB, g.top + 0.185, g.knob * 0.9)
        calcium = 0.08 * soft(0.18 - np.abs(ring - 1), 0.12)
        calcium *= soft(g.top + 0.19 - v, 0.02)
        grey += calcium
    if g.stomach:
        gas = film.ellipse(0.15, g.dome[1] + 0.045, *g.bubble, edge=0.6, tilt=-0.1)
        grey -= 0.15 * gas * soft(v - film.floor - 0.012, 0.008)
    grey += film.extra
    grey += 0.04 * cloud(rng, film.size, 3)
    grey *= body
    grey += film.over
    return grey
