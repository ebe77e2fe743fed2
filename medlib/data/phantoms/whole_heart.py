"""A whole heart with the great vessels in its chest, normal or malformed, drawn from random parameters.

Body's frame: mm, x to the patient's right, y to the front, z up; the origin lies in the middle of the heart. The
heart's own frame has its third axis along the left ventricle, from the base to the apex (to the left, to the front and
down), and its first from the left to the right ventricle.

A malformation is a set of parameter ranges, `MALFORMATIONS`: a ventricle that is too large, holes in the septa, great
arteries that are too narrow, that ride on the septum or that have changed places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medlib.data.phantoms.abdomen import draw_tissues
from medlib.data.phantoms.shapes import Array, ellipse_distance
from medlib.data.phantoms.short_axis import Range
from medlib.data.phantoms.solids import (
    EVERYWHERE,
    FAR,
    Block,
    Box,
    Curve,
    Distance,
    Solid,
    Tube,
    Vector,
    around,
    common,
    corners,
    ellipsoid,
    local,
    turn,
    union,
)

PARTS = ("LV", "RV", "LA", "RA", "MYO", "aorta", "pulmonary artery")

# mean and spread between patients: HU with contrast medium that comes through the left heart; MR as a share of blood
CT: dict[str, tuple[float, float]] = {
    "air": (-1000, 0),
    "lung": (-850, 25),
    "vessel": (120, 40),
    "fat": (-95, 8),
    "muscle": (55, 8),
    "bone": (200, 40),
    "cortex": (520, 80),
    "disc": (85, 10),
    "cord": (30, 5),
    "liver": (85, 18),
    "left blood": (375, 55),
    "right blood": (235, 75),
    "lung blood": (290, 75),
    "myocardium": (112, 14),
    "wall": (70, 10),
}
MR: dict[str, tuple[float, float]] = {
    "air": (0.0, 0.0),
    "lung": (0.06, 0.02),
    "vessel": (0.5, 0.1),
    "fat": (0.5, 0.15),
    "muscle": (0.3, 0.05),
    "bone": (0.35, 0.08),
    "cortex": (0.08, 0.02),
    "disc": (0.3, 0.05),
    "cord": (0.4, 0.06),
    "liver": (0.4, 0.07),
    "left blood": (1.0, 0.08),
    "right blood": (0.9, 0.1),
    "lung blood": (0.92, 0.1),
    "myocardium": (0.42, 0.07),
    "wall": (0.3, 0.04),
}
TISSUES: dict[str, dict[str, tuple[float, float]]] = {"CT": CT, "MR": MR}


@dataclass(frozen=True)
class Malformation:
    """What sets a heart apart. Sizes are factors of the normal, holes radii in mm (0: none)."""

    right: Range = Range(0.92, 1.08)  # right ventricle
    left: Range = Range(0.92, 1.08)  # left ventricle
    right_atrium: Range = Range(0.92, 1.1)
    aorta: Range = Range(0.92, 1.1)
    pulmonary: Range = Range(0.92, 1.1)  # trunk of the pulmonary artery
    ventricular_hole: Range = Range(0, 0)
    atrial_hole: Range = Range(0, 0)
    override: Range = Range(0, 0)  # aortic root towards the right ventricle, mm
    switched: bool = False  # the aorta rises from the right ventricle, the pulmonary artery from the left
    mirrored: bool = False  # apex to the right


MALFORMATIONS = {
    "none": Malformation(),
    "atrial septal defect": Malformation(
        right=Range(1.1, 1.3), right_atrium=Range(1.12, 1.3), pulmonary=Range(1.05, 1.3), atrial_hole=Range(6, 11)
    ),
    "ventricular septal defect": Malformation(
        left=Range(1.02, 1.18), pulmonary=Range(1.0, 1.25), ventricular_hole=Range(5, 9)
    ),
    "tetralogy of Fallot": Malformation(
        right=Range(1.1, 1.3),
        aorta=Range(1.15, 1.35),
        pulmonary=Range(0.5, 0.75),
        ventricular_hole=Range(7, 10),
        override=Range(8, 15),
    ),
    "transposition": Malformation(right=Range(1.08, 1.3), left=Range(0.85, 1.0), switched=True),
    "pulmonary stenosis": Malformation(right=Range(1.0, 1.2), pulmonary=Range(0.45, 0.65)),
    "dextrocardia": Malformation(mirrored=True),
}

TRUNK = np.array([(-27, 26, 33), (-29, 16, 46), (-28, 3, 56)], float)
RIGHT_BRANCH = [(-26, -3, 57), (-10, -13, 57), (14, -19, 55), (40, -22, 50)]
LEFT_BRANCH = [(-27, -2, 58), (-40, -18, 61), (-60, -32, 56)]
SPINE: Box = ((-25, -145, -FAR), (25, -60, FAR))
ASCENDING = np.array([(-15, -2, 4), (-9, 5, 18), (1, 9, 38), (4, 7, 60), (1, 0, 76)], float)


def draw_heart(rng: np.random.Generator, modality: str, kind: str, *, whole_aorta: bool) -> tuple[Solid, ...]:
    """The parts of a chest with a heart of `kind`, a key of `MALFORMATIONS`, in painting order.

    modality: "CT" or "MR". whole_aorta: whether arch and descending part are labelled too, as in CHD; in MMWHS only
    the ascending part is.
    """
    malformed = MALFORMATIONS[kind]
    build = _Builder(rng, draw_tissues(rng, TISSUES[modality]), malformed.mirrored)
    build.chest()
    build.heart(malformed)
    build.arteries(malformed, whole_aorta)
    return tuple(build.solids)


class _Builder:
    """Collects the parts; each method adds what its name says, on top of what is there."""

    def __init__(self, rng: np.random.Generator, tissues: dict[str, float], mirrored: bool) -> None:
        self.rng, self.tissues, self.side = rng, tissues, -1.0 if mirrored else 1.0
        self.solids: list[Solid] = []

    def add(
        self,
        distance: Distance,
        box: Box,
        layers: Sequence[tuple[float, str]],
        label: str | None = None,
        within: str = "",
    ) -> None:
        values = tuple((depth, self.tissues[what]) for depth, what in layers)
        if self.side < 0:
            (low, *front), (high, *back) = box
            box = corners((-high, *front), (-low, *back))

        def mirrored(block: Block) -> Array:
            return distance(Block(-block.x, block.y, block.z, block.width))

        self.solids.append(Solid(mirrored if self.side < 0 else distance, box, values, label, within))

    def tube(
        self,
        points: Curve,
        radii: Vector | float,
        layers: Sequence[tuple[float, str]],
        label: str | None = None,
        within: str = "",
    ) -> None:
        tube = Tube.through(points, radii)
        self.add(tube, tube.box(3), layers, label, within)

    def jitter(self, points: np.ndarray, spread: float) -> np.ndarray:
        return points + np.clip(self.rng.normal(0, 1, points.shape), -2, 2) * spread

    # --------------------------------------------------------------------------------------------------- the chest
    def chest(self) -> None:
        rng = self.rng
        fat, muscle = rng.uniform(6, 30), rng.uniform(14, 24)
        domes = (-44 + rng.normal(0, 5), -60 + rng.normal(0, 5))

        def cavity(block: Block) -> Array:
            narrow = 1 - np.float32(0.0012) * np.maximum(block.z, 0)
            return ellipse_distance(block.x / narrow, block.y + 14, 126.0, 90.0)

        def roof(block: Block) -> Array:
            back = np.float32(0.006) * (block.y - 5) ** 2
            right = block.z - (domes[0] - np.float32(0.009) * (block.x - 60) ** 2 - back)
            return union(right, block.z - (domes[1] - np.float32(0.009) * (block.x + 62) ** 2 - back), 25) / 1.5

        self.add(lambda block: cavity(block) - (muscle + fat), EVERYWHERE, [(0, "muscle"), (2, "fat")])
        self.add(lambda block: cavity(block) - muscle, EVERYWHERE, [(0, "muscle")])
        gap, first = rng.uniform(26, 31), rng.uniform(0, 25)

        def ribs(block: Block) -> Array:
            around_chest = np.arctan2(np.abs(block.x) / 126, -(block.y + 14) / 90)  # 0 at the spine, pi in front
            height = (block.z + np.float32(32) * around_chest - first) / np.float32(gap)
            slanted = np.float32(0.8 * gap) * (height - np.round(height))
            ring = np.hypot(slanted * np.float32(0.75), cavity(block) - np.float32(0.4 * muscle)) - 4.6
            return np.maximum(ring, np.maximum(45 * (around_chest - 2.7), 45 * (0.3 - around_chest)))

        self.add(ribs, EVERYWHERE, [(0, "cortex"), (1.8, "bone")])
        self.add(cavity, EVERYWHERE, [(0, "fat")])

        def lung(block: Block) -> Array:
            middle = 26 - np.hypot(block.x + 2, np.float32(0.3) * (block.y + 20))
            return common(common(cavity(block) + 2, -roof(block) + 2, 8), middle, 12)

        self.add(lung, EVERYWHERE, [(0, "lung")])
        for _ in range(36):
            side, level = rng.choice((-1, 1)), rng.uniform(-40, 70)
            root = np.array((side * 34, -28, 30 + 0.4 * level))
            end = np.array((side * rng.uniform(60, 110), rng.uniform(-85, 45), level))
            vessel = Tube.through([root, (root + end) / 2 + rng.normal(0, 7, 3), end], [4.5, 2.6, 1.0])

            def inside(block: Block, vessel: Tube = vessel) -> Array:
                return np.maximum(vessel(block), lung(block) + 2)

            self.add(inside, vessel.box(1), [(0, "vessel")])
        self.add(lambda block: np.maximum(roof(block), cavity(block) + 2), EVERYWHERE, [(0, "wall"), (3, "fat")])
        liver = ellipsoid((52, -4, -98), (82, 84, 62))
        self.add(
            lambda block: common(liver(block), np.maximum(roof(block) + 3, cavity(block) + 4), 8),
            around((52, -4, -98), 90), [(0, "liver")],
        )  # fmt: skip
        step = 24.0

        def column(block: Block) -> Array:
            return ellipse_distance(block.x, block.y + 84, 18.0, 15.0)

        def vertebra(block: Block) -> Array:
            height = block.z - first
            return common(column(block), np.abs(height - np.round(height / step) * step) - 9.5, 4)

        def arch(block: Block) -> Array:
            height = block.z - first
            ring = union(
                ellipse_distance(block.x, block.y + 108, 14, 10), ellipse_distance(block.x, block.y + 124, 4, 14), 3
            )
            return common(ring, np.abs(height - np.round(height / step) * step) - 9, 4)

        self.add(column, SPINE, [(0, "disc")])
        self.add(vertebra, SPINE, [(0, "cortex"), (2, "bone")])
        self.add(arch, SPINE, [(0, "cortex"), (2, "bone")])
        self.add(lambda block: ellipse_distance(block.x, block.y + 106, 8, 7), SPINE, [(0, "cord")])
        sternum = ellipsoid((0, 80, 30), (17, 6, 85), turn(8))
        self.add(sternum, around((0, 80, 30), (20, 24, 88)), [(0, "cortex"), (1.8, "bone")])

    # --------------------------------------------------------------------------------------------------- the heart
    def heart(self, malformed: Malformation) -> None:
        rng = self.rng
        axis = np.array((-0.62, 0.55, -0.56)) + rng.normal(0, 0.06, 3)
        axis /= np.linalg.norm(axis)
        septum = np.array((0.74, 0.66, -0.05))
        septum -= (septum @ axis) * axis
        septum /= np.linalg.norm(septum)
        self.frame = np.stack([septum, np.cross(axis, septum), axis], 1)
        centre = self.centre = np.array((-40.0, 6.0, -14.0)) + rng.normal(0, 1.5, 3)
        left, right = malformed.left.draw(rng), malformed.right.draw(rng)
        wall = rng.uniform(8.5, 12)
        cavity = np.array((21.5, 21.5, 48)) * left * rng.uniform(0.94, 1.06, 3)
        inner = ellipsoid(centre, cavity, self.frame)
        outer = ellipsoid(centre, cavity + (wall, wall, 0.8 * wall), self.frame)

        def base(block: Block) -> Array:
            return -local(block, centre, self.frame)[2] - np.float32(0.52 * cavity[2])

        envelope, middle = ellipsoid((-18, 6, -8), (54, 56, 76), self.frame), (-18, 6, -8)
        self.add(envelope, around(middle, 80), [(0, "wall"), (1.5, "fat")])

        # veins and the right heart
        self.tube([(30, -2, 110), (31, -2, 60), (29, 0, 26)], [9, 9.5, 11], [(0, "wall"), (1.2, "right blood")])
        self.tube([(27, -16, -125), (27, -10, -60), (27, 0, -25)], [12, 12, 13], [(0, "wall"), (1.2, "right blood")])
        atrium = np.array((25.5, 27, 30)) * malformed.right_atrium.draw(rng)
        place = np.array((31.0, 5.0, -4.0)) + rng.normal(0, 1.5, 3)
        right_body = ellipsoid(place, atrium, turn(0, 8, 0))
        right_ear = ellipsoid((17, 30, 14), (13, 11, 12), turn(20, 0, 30))

        def right_atrium(block: Block) -> Array:
            return union(right_body(block), right_ear(block), 8)

        self.add(right_atrium, around(place, 56), [(-2, "wall"), (0, "right blood")], "RA")

        chamber = np.array((35, 36, 48)) * right
        seat = centre + self.frame @ (19 + 8 * right, 0, -7)
        bag = ellipsoid(seat, chamber, self.frame)
        outflow = Tube.through([(-16, 26, 0), (-22, 31, 16), *TRUNK[:1]], np.multiply((17, 15, 12), right**0.5))

        def ventricle(block: Block) -> Array:
            below = common(bag(block), -local(block, centre, self.frame)[2] - np.float32(0.62 * cavity[2]), 7)
            return common(union(below, outflow(block), 9), -outer(block), 3)

        self.add(ventricle, around(seat, 80), [(-3.2, "myocardium")])
        self.add(ventricle, around(seat, 75), [(0, "right blood")], "RV")

        # the left heart
        self.add(lambda block: common(outer(block), base(block), 3), around(centre, 80), [(0, "myocardium")], "MYO")
        self.add(lambda block: common(inner(block), base(block) - 2, 3), around(centre, 72), [(0, "left blood")], "LV")
        for angle in (0.8, 2.6):  # papillary muscles
            foot = centre + self.frame @ (-0.62 * cavity[0] * np.cos(angle), 0.62 * cavity[1] * np.sin(angle), 22)
            top = centre + self.frame @ (-0.45 * cavity[0] * np.cos(angle), 0.45 * cavity[1] * np.sin(angle), -4)
            self.tube([foot, top], [4.5, 2.8], [(0, "myocardium")], "", within="LV")
        place = np.array((-7.0, -33.0, 13.0)) + rng.normal(0, 1.5, 3)
        atrium = np.array((34, 21, 25)) * rng.uniform(0.92, 1.14)
        left_body = ellipsoid(place, atrium, turn(-10, -6, 0))
        left_ear = Tube.through([(-30, -22, 20), (-42, -8, 27), (-47, 4, 25)], [10, 8, 5])
        for points in (
            [(20, -38, 20), (38, -42, 28), (56, -48, 36)],
            [(18, -42, 4), (36, -50, 0), (56, -56, -10)],
            [(-30, -40, 20), (-46, -46, 26), (-62, -52, 34)],
            [(-28, -44, 4), (-44, -54, 2), (-60, -62, -8)],
        ):
            self.tube(points, [8, 7, 5], [(0, "left blood")])

        def left_atrium(block: Block) -> Array:
            return common(union(left_body(block), left_ear(block), 6), 1 - common(outer(block), base(block), 3), 3)

        self.add(left_atrium, around(place, 62), [(-2, "wall"), (0, "left blood")], "LA")
        mitral = centre - self.frame[:, 2] * (0.5 * cavity[2])
        self.tube([mitral + 0.2 * (place - mitral), mitral + 6 * self.frame[:, 2]], [13, 13], [(0, "left blood")], "LV")
        if hole := malformed.ventricular_hole.draw(rng):
            ends = [centre + self.frame @ (u * cavity[0], -4, -16) for u in (0.7, 2.0)]
            self.tube(ends, hole, [(0, "left blood")], "LV", within="MYO")
        if hole := malformed.atrial_hole.draw(rng):
            self.tube([(12, -22, 8), (26, -10, 3)], hole, [(0, "left blood")], "LA")

    def arteries(self, malformed: Malformation, whole_aorta: bool) -> None:
        rng = self.rng
        wide = 14.0 * malformed.aorta.draw(rng)
        trunk = 12.5 * malformed.pulmonary.draw(rng)
        rising = self.jitter(ASCENDING, 1.2)
        lung = self.jitter(TRUNK, 1.0)
        rising[:2] += malformed.override.draw(rng) * self.frame[:, 0] * np.array([[1.0], [0.7]])
        if malformed.switched:
            rising = np.concatenate([[(-20, 30, 14), (-20, 29, 28), (-13, 22, 46)], rising[-2:]])
            lung = np.concatenate([[(-17, -3, 4), (-22, -4, 24)], [(-27, -6, 42), lung[-1]]])
        blood = [(0, "wall"), (1, "lung blood")]
        near = min(trunk, 11.0)
        self.tube(RIGHT_BRANCH, [near, 0.8 * near, 8, 6.5], blood, "pulmonary artery")
        self.tube(LEFT_BRANCH, [near, 8.5, 7], blood, "pulmonary artery")
        arch = np.array([rising[-1], (-8, -16, 88), (-20, -38, 82), (-25, -54, 62), (-25, -58, 20), (-22, -60, -140)])
        label = "aorta" if whole_aorta else None
        self.tube(arch, [wide * 0.95, 12.5, 12, 11.5, 11, 10], [(0, "wall"), (1.2, "left blood")], label)
        self.tube(lung, [trunk, *[1.03 * trunk] * (len(lung) - 2), trunk], blood, "pulmonary artery")
        self.tube(rising, [wide, 1.08 * wide, *[wide] * (len(rising) - 2)], [(0, "wall"), (1.2, "left blood")], "aorta")
        self.tube([(2, -58, 110), (0, -64, 0), (-8, -62, -120)], 7, [(-2, "fat"), (0, "wall")])  # oesophagus
