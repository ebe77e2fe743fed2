"""A hippocampus in its temporal lobe, one side of the brain, drawn from random parameters.

Body's frame: mm, x to the patient's right, y to the front, z up; the origin is the middle of the hippocampus of a
right temporal lobe (a left one is its mirror image). The two classes are head and body with tail; the border between
them is a plane that every rater puts somewhere else, and the amygdala in front of the head has its signal.
"""

from collections.abc import Sequence

import numpy as np

from medlib.data.phantoms.abdomen import draw_tissues
from medlib.data.phantoms.shapes import Array
from medlib.data.phantoms.solids import FAR, Block, Distance, Solid, Tube, Vector, around, ellipsoid, turn, union

PARTS = ("Anterior", "Posterior")

SIGNAL = {  # T1-weighted MRI as a share of white matter, mean and spread between patients
    "white": (1.0, 0.0),
    "hippocampus": (0.70, 0.04),
    "amygdala": (0.69, 0.04),
    "cortex": (0.63, 0.04),
    "fluid": (0.2, 0.04),
    "stem": (0.9, 0.03),
    "vessel": (0.12, 0.04),
}


def draw_temporal_lobe(rng: np.random.Generator) -> tuple[Solid, ...]:
    """The parts in painting order; what no part covers is white matter, 1."""
    tissues = draw_tissues(rng, SIGNAL)
    side = float(rng.choice((-1, 1)))
    size = rng.uniform(0.86, 1.12)
    solids: list[Solid] = []

    def add(
        distance: Distance,
        centre: Vector,
        reach: float,
        layers: Sequence[tuple[float, str]],
        label: str | None = None,
        softness: float = 0.6,
    ) -> None:
        def mirrored(block: Block) -> Array:
            return distance(Block(block.x * np.float32(side), block.y, block.z, block.width))

        values = tuple((depth, tissues[what]) for depth, what in layers)
        box = around((side * centre[0], centre[1], centre[2]), reach)
        solids.append(Solid(mirrored, box, values, label, softness=softness))

    # sulci of the lateral and the lower surface: folded ribbons of cortex around fluid
    phase, wave = rng.uniform(0, 6.28, 2), rng.uniform(9, 13)

    def ribbon(block: Block) -> Array:
        fold = np.sin(block.y / np.float32(wave) + phase[0]) + np.sin(block.z / np.float32(0.8 * wave) + phase[1])
        surface = np.minimum(17 - block.x + 2.2 * fold, block.z + 15 + 1.8 * fold + 0.12 * block.x)
        return np.abs(surface) - np.float32(0.9)

    add(ribbon, (0, 0, 0), FAR, [(-2.6, "cortex"), (0, "fluid")])
    add(ellipsoid((-20, -4, 8), (11, 22, 20), turn(10)), (-20, -4, 8), 26, [(-2.5, "fluid"), (0, "stem")])
    cleft = Tube.through([(-11, 22, -2), (-9, 8, 3), (-8, -8, 7), (-7, -26, 10)], [2.5, 2.2, 2.6, 3])
    add(cleft, (-9, 0, 3), 34, [(0, "fluid")])
    entorhinal = Tube.through([(-8, 20, -9), (-6, 4, -8), (-5, -14, -4)], [4.5, 4, 3])
    add(entorhinal, (-6, 2, -7), 28, [(0, "cortex")])
    almond = (-2.0 + rng.normal(0, 0.7), 19.5 * size, 5.5)
    add(ellipsoid(almond, (8, 7.5, 7.5), turn(20, 10, 0)), almond, 12, [(0, "amygdala")], softness=1.5)

    points = np.array([(-3, 14, -2.5), (-1.5, 8, -3.5), (1.5, 0, -2), (1.5, -9, 1), (-1.5, -17, 4.5), (-5.5, -21.5, 8)])
    points = points * (1, size, 1) + np.clip(rng.normal(0, 0.7, (6, 3)), -1.4, 1.4)
    tube = Tube.through(points, np.array([5.2, 5.8, 4.6, 4.1, 3.5, 2.4]) * size**0.5)
    bend = ellipsoid(points[0] + (-4, -2, 2), (4.2, 4, 3.4), turn(0, 20, 0))  # the uncus

    def whole(block: Block) -> Array:
        flat = Block(block.x, block.y, (block.z - np.float32(1)) * np.float32(1.12) + 1, block.width)
        return union(tube(flat), bend(block), 2.5)

    horn = Tube.through(points[:5] + (4.5, 0, 4.5), [2.2, 1.8, 1.5, 1.8, 2.4])
    add(horn, (4, 0, 4), 32, [(0, "fluid")])
    border, slope = rng.normal(2.5, 1.2), rng.normal(0, 0.12)

    def plane(block: Block) -> Array:
        return block.y - np.float32(border) + np.float32(slope) * block.z

    ends: dict[str, Distance] = {"Anterior": lambda block: -plane(block), "Posterior": plane}
    for name, end in ends.items():

        def part(block: Block, end: Distance = end) -> Array:
            return np.maximum(whole(block), end(block))

        add(part, (0, 0, 0), 34, [(0, "hippocampus")], name, softness=0.8)
    for _ in range(3):
        spot = (rng.uniform(-12, -6), rng.uniform(-20, 20), rng.uniform(0, 12))
        path = Tube.through([spot, np.add(spot, rng.normal(0, 5, 3))], 0.9)
        add(path, spot, 16, [(0, "vessel")])
    return tuple(solids)
