"""How the eight organs of phantoms.py are painted: numpy only, over 500 images a second.

Lengths are units, 112 to a side whatever the size in pixels; the origin is the centre, x runs to
the viewer's right and y down. Tones run from 0 to 1, black to white; in pathology, clear to purple.

Shapes: S pixels a side.
"""

import math
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=16)
def axis(size: int) -> np.ndarray:
    """(S,) where the pixels of a row or column have their centres, in units."""
    return (np.arange(size, dtype=np.float32) + 0.5) * (112 / size) - 56


@lru_cache(maxsize=64)
def stretcher(cells: int, size: int) -> np.ndarray:
    """(S, cells) weights that stretch so many samples smoothly over S pixels."""
    at = np.linspace(0, cells - 1, size, dtype=np.float32)[:, None] - np.arange(cells)
    near = np.clip(1 - np.abs(at), 0, 1).astype(np.float32)
    return near * near * (3 - 2 * near)


class Canvas:
    """A grey image to paint on, in a frame that can be turned, scaled and shifted."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.image = np.zeros((size, size), np.float32)
        self.eosin = None  # (S, S) pathology's pink ink; the purple one is `image`

    def frame(self, pose: complex, shift: complex) -> None:
        """What is painted from now on is multiplied by `pose`, then moved by `shift`."""
        back, x, y = 1 / pose, axis(self.size) - shift.real, axis(self.size)[:, None] - shift.imag
        self.x = back.real * x - back.imag * y  # (S, S)
        self.y = back.imag * x + back.real * y  # (S, S)
        self.pose, self.shift = pose, shift

    def window(self, reach: float, *points: complex) -> tuple[slice, slice]:
        """The rows and columns within `reach` of the points: small shapes cost little."""
        z = [p * self.pose + self.shift for p in points]
        spans = []
        for at in ([p.imag for p in z], [p.real for p in z]):
            edges = min(at) - 1.1 * reach + 54, max(at) + 1.1 * reach + 58
            spans.append(slice(*(max(int(edge * self.size / 112), 0) for edge in edges)))
        return spans[0], spans[1]

    def fill(self, window: tuple[slice, slice], depth: np.ndarray, tone: float) -> None:
        """Paint where `depth`, the units inside the edge, is positive; edges are soft."""
        cover = np.clip(depth * 0.7 + 0.5, 0, 1)
        patch = self.image[window]  # a view: painting it paints the image
        patch += cover * (tone - patch)
        if self.eosin is not None and tone == 0:  # a hole holds neither ink
            self.eosin[window] *= 1 - cover

    def ellipse(self, x, y, rx, ry, tone, turn=0.0, ring=0.0) -> None:
        """A filled ellipse; or its outline, `ring` units thick."""
        window = self.window(max(rx, ry) + ring, complex(x, y))
        u, v = self.x[window] - x, self.y[window] - y
        if turn:
            c, s = math.cos(turn), math.sin(turn)
            u, v = c * u + s * v, c * v - s * u
        u, v = u / rx, v / ry
        depth = (1 - np.sqrt(u * u + v * v)) * min(rx, ry)
        self.fill(window, ring / 2 - np.abs(depth) if ring else depth, tone)

    def ellipses(self, *rows: tuple[float, ...]) -> None:
        for row in rows:
            self.ellipse(*row)

    def pairs(self, *rows: tuple[float, ...]) -> None:
        """Ellipses (x, y, rx, ry, tone, turn), each with its mirror image."""
        for x, y, rx, ry, tone, turn in rows:
            self.ellipses((x, y, rx, ry, tone, turn), (-x, y, rx, ry, tone, -turn))

    def rod(self, x0, y0, x1, y1, radius, tone, bones=0) -> None:
        """A line with round ends; `bones` cuts it into so many, each thick at its ends."""
        window = self.window(radius, complex(x0, y0), complex(x1, y1))
        u, v = self.x[window] - x0, self.y[window] - y0
        dx, dy = x1 - x0, y1 - y0
        t = np.clip((u * dx + v * dy) / (dx * dx + dy * dy), 0, 1)
        u, v = u - t * dx, v - t * dy
        if bones:
            end = np.square(2 * (t * bones - np.floor(t * bones)) - 1)  # 0 mid-bone, 1 in a joint
            radius = radius * (0.7 + 0.5 * end - 1.1 * np.square(np.square(end * end)))
        self.fill(window, radius - np.sqrt(u * u + v * v), tone)

    def clouds(self, cells: int) -> np.ndarray:
        """(S, S) smooth noise, about so many blobs to a side."""
        stretch = stretcher(cells, self.size)
        return stretch @ self.rng.standard_normal((cells, cells), np.float32) @ stretch.T

    def dots(self, n: int, radius: float) -> np.ndarray:
        """(S, S) round dots at random places: a sum of separable bells is one matrix product."""
        at = (self.rng.random((2, n, 1), np.float32) - 0.5) * 116
        bells = np.exp((axis(self.size) - at) ** 2 * (-0.7 / radius**2))
        return np.clip(2 * (bells[0].T @ bells[1]) - 0.5, 0, 1)

    def lattice(self, pitch: float, wobble: float) -> np.ndarray:
        """(S, S) units to the nearest point of an uneven hexagonal lattice."""
        x = (self.x + wobble * self.clouds(7)) / pitch + self.rng.random()
        y = (self.y + wobble * self.clouds(7)) / (0.87 * pitch) + self.rng.random()
        row = np.floor(y)
        x += 0.5 * row  # each row is half a cell further along
        u, v = x - np.floor(x) - 0.5, (y - row - 0.5) * 0.87
        return np.sqrt(u * u + v * v) * pitch


def head(c: Canvas) -> None:
    """An axial slice: bright skull, grey brain, dark ventricles."""
    c.ellipses((0, 0, 45, 53, 0.95), (0, 0, 41, 49, 0.5), (0, 1, 1.2, 5, 0.2))
    c.rod(0, -47, 0, 47, 0.5, 0.66)
    c.pairs((4.5, -12, 2.6, 10, 0.16, 0.35), (6.5, 11, 2.4, 9, 0.16, -0.45))
    c.image *= 1 + 0.04 * c.clouds(24)


def abdomen(c: Canvas) -> None:
    """An axial slice: liver on the viewer's left, stomach, spleen, kidneys, spine and vessels."""
    c.ellipses((0, 0, 54, 45, 0.3), (0, 0, 50.5, 41.5, 0.5), (0, -2, 47, 37, 0.42))
    c.ellipses((-22, -9, 25, 26, 0.58, 0.3), (16, -18, 15, 9, 0.5, 0.4), (36, 2, 9, 17, 0.58, -0.2))
    c.pairs((22, 19, 8, 11, 0.66, 0.4), (19, 19, 3, 5, 0.5, 0), (13, 32, 9, 6, 0.54, 0))
    c.ellipses((0, 22, 9, 7.5, 0.95), (0, 31, 3, 2.5, 0.4), (0, 37, 1.5, 4, 0.95))
    c.ellipses((3, 11, 4, 4, 0.72), (-6, 11, 4, 3.4, 0.66))
    c.image *= 1 + 0.06 * c.clouds(20)


def brain(c: Canvas) -> None:
    """An axial FLAIR slice: thin scalp, dark skull, folded cortex, dark ventricles."""
    c.ellipses((0, 0, 46, 54, 0.8), (0, 0, 43, 51, 0.06), (0, 0, 40.5, 48.5, 0.52))
    rim = np.clip(np.sqrt((c.x / 40) ** 2 + (c.y / 48) ** 2) * 3 - 1.8, 0.15, 1)
    c.image *= 1 - 0.75 * rim * np.clip(1 - 3.5 * np.abs(c.clouds(22)), 0, 1)  # folds: near zero
    c.rod(0, -47, 0, 47, 0.7, 0.1)
    c.pairs((4.5, -10, 2.8, 11, 0.08, 0.3), (7, 12, 2.6, 10, 0.08, -0.5), (13, 0, 4, 8, 0.6, -0.3))


def knee(c: Canvas) -> None:
    """A coronal slice: femur above tibia and fibula, cartilage bright and menisci dark between."""
    c.rod(0, -70, 0, 70, 46, 0.32)
    c.image += 0.07 * np.sin(c.x * 0.45 + 0.3 * c.clouds(6)) * (c.image > 0.2)
    for cortex, tone in ((0, 0.06), (1.6, 0.5)):  # the dark bone first, then the marrow inside it
        c.rod(0, -70, 0, -30, 17 - cortex, tone)
        c.rod(0, 32, 0, 70, 15 - cortex, tone)
        c.ellipse(36, 38, 7 - cortex, 12 - cortex, tone)
        c.pairs((17, -17, 18 - cortex, 17 - cortex, tone, 0))
        c.pairs((16, 18, 20 - cortex, 12 - cortex, tone, 0))
    c.ellipse(0, -1, 4.5, 8, 0.1)
    c.pairs((19, 2.7, 10, 1.5, 0.8, 0), (33, 2.5, 7, 2.4, 0.05, 0))
    c.image *= 1 + 0.06 * c.clouds(18)


def chest(c: Canvas) -> None:
    """From the front: dark lungs with ribs, collar bones, spine, heart, diaphragm."""
    c.ellipse(0, 20, 54, 66, 0.55)
    c.rod(-38, -36, 38, -36, 13, 0.5)
    c.rod(0, -60, 0, -40, 11, 0.55)
    c.pairs((23, -3, 18, 38, 0.26, 0.12))
    ribs = np.clip(np.sin((c.y + 0.012 * c.x * c.x) * 0.56), 0, 1)
    c.image += 0.11 * ribs * (c.image > 0.2) * (np.abs(c.x) < 46)
    c.pairs((22, -41, 19, 1.8, 0.68, -0.16), (24, 44, 22, 14, 0.62, 0))
    c.rod(0, -60, 0, 60, 4.5, 0.64)
    c.ellipses((0, -8, 8, 20, 0.6), (9, 16, 19, 13, 0.64, 0.6))


def hand(c: Canvas) -> None:
    """From the back: five rays of bones in their flesh, wrist and forearm."""
    c.image += 0.1
    c.ellipse(2, 26, 35, 29, 0.34)
    c.rod(0, 40, 0, 70, 22, 0.34)
    for radius, tone, bones in ((9.5, 0.34, 0), (5.2, 0.66, 1)):
        for x, y, base in ((-33, -36, -19), (-12, -49, -6), (9, -52, 6), (30, -42, 19)):
            c.rod(x, y, base, 30, radius, tone, 4 * bones)
        c.rod(51, -2, 16, 38, radius, tone, 3 * bones)
    for x, y in ((-13, 33), (-5, 35), (4, 34), (12, 37), (-9, 41), (1, 42)):
        c.ellipses((x, y, 5, 4.2, 0.62), (x, y, 5, 4.2, 0.75, 0, 1))
    c.rod(-9, 52, -10, 70, 6.5, 0.64)
    c.rod(8, 51, 9, 70, 8, 0.64)


def colon(c: Canvas) -> None:
    """Round glands in rows: a wall of nuclei, pale mucus, a white lumen; dots between them."""
    r = c.lattice(27, 2.2)
    wall, inside, lumen = np.clip(1 - np.abs(r - 9.5) / 1.6, 0, 1), r < 9, np.clip(3.5 - r, 0, 1)
    nuclei = c.dots(140, 1.3) * (r > 11)
    c.image = 0.12 + 0.7 * wall + 0.7 * nuclei + 0.1 * inside - 0.2 * lumen
    c.eosin = 0.55 + 0.08 * c.clouds(16) - 0.25 * inside - 0.3 * lumen


def breast(c: Canvas) -> None:
    """Pink wavy fibres with a few nuclei, patches of white fat cells, and ducts."""
    r = c.lattice(19, 1.6)
    fat = np.clip(2.5 * (c.clouds(4) - 0.3), 0, 1) * np.clip(9.2 - r, 0, 1)
    fibres = np.sin(0.5 * c.y + 0.2 * c.x + 2.5 * c.clouds(6))
    c.eosin = (0.62 + 0.16 * fibres) * (1 - 0.97 * fat)
    c.image = (0.08 + 0.8 * c.dots(70, 1.2)) * (1 - fat)
    for x, y in c.rng.uniform(-46, 46, (2, 2)).tolist():
        c.ellipses((x, y, 9, 8, 0.65, 0, 3.4), (x, y, 6.5, 5.5, 0))


PAINTERS = {f.__name__: f for f in (head, abdomen, brain, knee, chest, hand, colon, breast)}


def stain(purple: np.ndarray, pink: np.ndarray) -> np.ndarray:
    """(3, S, S) the colour of light after haematoxylin and eosin, by Beer-Lambert."""
    absorbs = np.float32([[1.05, 0.08], [1.25, 0.75], [0.45, 0.28]])  # red, green, blue by ink
    return np.exp(-np.tensordot(absorbs, np.stack([purple, pink]), 1))
