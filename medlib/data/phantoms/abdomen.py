"""An abdomen with its organs from the bases of the lungs to the pelvis, drawn from random parameters.

`draw_abdomen` gives the parts in the order in which they are painted; `solids` has the body's frame (mm, x to the
patient's right, y to the front, z up). The origin lies in front of the spine at the height of the kidneys' hila.

What makes organs hard is what makes them hard in patients: adrenal glands are plates a few mm thick, the oesophagus
and the duodenum look like the muscle and the bowel beside them, the gallbladder may be collapsed, full or removed,
and everything hollow changes shape. Organs that a patient lacks are lacking in the labels too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medlib.data.phantoms.shapes import Array, ellipse_distance
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
    turn,
    union,
)

ORGANS = (
    "liver",
    "tumour",
    "right kidney",
    "left kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "right adrenal",
    "left adrenal",
    "gallbladder",
    "oesophagus",
    "stomach",
    "duodenum",
    "bladder",
    "prostate or uterus",
)

ABSENT = {  # share of patients without it, by surgery or from birth
    "gallbladder": 0.14,
    "right kidney": 0.03,
    "left kidney": 0.03,
    "spleen": 0.03,
    "right adrenal": 0.03,
    "left adrenal": 0.03,
    "prostate or uterus": 0.06,
}

# mean and spread between patients: HU in the portal-venous phase; MR as a share of the brightest tissue, T1-weighted
CT: dict[str, tuple[float, float]] = {
    "air": (-1000, 0),
    "lung": (-845, 25),
    "fat": (-103, 6),
    "skin": (15, 10),
    "muscle": (56, 6),
    "bone": (190, 45),
    "cortex": (560, 90),
    "disc": (85, 10),
    "cord": (28, 6),
    "blood": (140, 20),
    "myocardium": (105, 12),
    "liver": (104, 14),
    "liver vessel": (150, 12),
    "tumour": (62, 14),
    "spleen": (117, 12),
    "renal cortex": (185, 22),
    "renal medulla": (142, 20),
    "renal pelvis": (20, 30),
    "pancreas": (92, 11),
    "aorta": (158, 22),
    "vena cava": (132, 18),
    "portal vein": (158, 16),
    "gut wall": (74, 9),
    "fluid": (16, 8),
    "stool": (2, 25),
    "gas": (-820, 60),
    "bile": (9, 7),
    "adrenal": (72, 10),
    "gullet": (52, 7),
    "urine": (7, 5),
    "prostate": (58, 8),
    "uterus": (86, 12),
    "table": (-620, 40),
}
MR: dict[str, tuple[float, float]] = {
    "air": (0.0, 0.0),
    "lung": (0.04, 0.01),
    "fat": (0.52, 0.12),
    "skin": (0.3, 0.05),
    "muscle": (0.3, 0.04),
    "bone": (0.4, 0.07),
    "cortex": (0.08, 0.02),
    "disc": (0.3, 0.05),
    "cord": (0.24, 0.04),
    "blood": (0.75, 0.1),
    "myocardium": (0.42, 0.05),
    "liver": (0.54, 0.06),
    "liver vessel": (0.74, 0.06),
    "tumour": (0.33, 0.06),
    "spleen": (0.46, 0.06),
    "renal cortex": (0.62, 0.07),
    "renal medulla": (0.48, 0.06),
    "renal pelvis": (0.22, 0.05),
    "pancreas": (0.55, 0.05),
    "aorta": (0.8, 0.08),
    "vena cava": (0.72, 0.07),
    "portal vein": (0.76, 0.07),
    "gut wall": (0.45, 0.05),
    "fluid": (0.2, 0.05),
    "stool": (0.36, 0.08),
    "gas": (0.02, 0.01),
    "bile": (0.25, 0.08),
    "adrenal": (0.38, 0.04),
    "gullet": (0.36, 0.04),
    "urine": (0.18, 0.04),
    "prostate": (0.34, 0.04),
    "uterus": (0.42, 0.05),
    "table": (0.0, 0.0),
}


@dataclass(frozen=True)
class Abdomen:
    """One patient's parts in painting order, the organs it has, and the signal of each of its tissues."""

    solids: tuple[Solid, ...]
    organs: frozenset[str]
    tissues: dict[str, float]


def draw_tissues(rng: np.random.Generator, table: dict[str, tuple[float, float]]) -> dict[str, float]:
    """One patient's value of every tissue of `table`, cut at two standard deviations."""
    return {name: float(mean + spread * np.clip(rng.normal(), -2, 2)) for name, (mean, spread) in table.items()}


def draw_abdomen(rng: np.random.Generator, modality: str, tumours: int = 0) -> Abdomen:
    """An abdomen as seen by `modality` ("CT" or "MR") with that many `tumours` in its liver."""
    tissues = draw_tissues(rng, {"CT": CT, "MR": MR}[modality])
    tissues["tumour"] = min(tissues["tumour"], 0.72 * tissues["liver"])
    tissues["tumour rim"] = 0.3 * tissues["tumour"] + 0.7 * tissues["liver"]
    lacking = {name for name, share in ABSENT.items() if rng.random() < share}
    if {"right kidney", "left kidney"} <= lacking:
        lacking.remove("left kidney")
    build = _Builder(rng, tissues)
    build.wall(table=modality == "CT")
    build.chest()
    build.skeleton()
    build.bowel()
    build.liver(tumours)
    build.stomach()
    build.spleen(kept="spleen" not in lacking)
    build.kidneys(lacking)
    build.vessels()
    build.pancreas()
    build.duodenum()
    build.adrenals(lacking)
    if "gallbladder" not in lacking:
        build.gallbladder()
    build.oesophagus()
    build.pelvis(womb=rng.random() < 0.5, kept="prostate or uterus" not in lacking)
    return Abdomen(tuple(build.solids), frozenset(solid.label for solid in build.solids if solid.label), tissues)


class _Builder:
    """Collects the parts; each method adds what its name says, on top of what is there."""

    def __init__(self, rng: np.random.Generator, tissues: dict[str, float]) -> None:
        self.rng, self.tissues = rng, tissues
        self.solids: list[Solid] = []
        self.thick = rng.uniform(9, 15)  # muscle of the flank
        self.fat = rng.uniform(5, 38)  # under the skin, in front
        self.visceral = rng.uniform(0, 1)  # fat between the organs
        self.domes = (112 + rng.normal(0, 7), 101 + rng.normal(0, 7))  # right and left diaphragm

    def jitter(self, points: Curve, spread: float) -> np.ndarray:
        """`points` moved at random by `spread` mm, the first and the last by half of it."""
        size = np.full((len(points), 1), float(spread))
        size[[0, -1]] /= 2
        return np.asarray(points, float) + np.clip(self.rng.normal(0, 1, (len(points), 3)), -2, 2) * size

    def add(
        self,
        distance: Distance,
        box: Box,
        layers: Sequence[tuple[float, str | float]],
        label: str | None = None,
        **options: object,
    ) -> None:
        values = tuple((depth, self.tissues[what] if isinstance(what, str) else what) for depth, what in layers)
        self.solids.append(Solid(distance, box, values, label, **options))  # type: ignore[arg-type]

    def tube(
        self,
        points: Curve,
        radii: Vector | float,
        layers: Sequence[tuple[float, str | float]],
        label: str | None = None,
        **options: object,
    ) -> Tube:
        tube = Tube.through(points, radii)
        self.add(tube, tube.box(3), layers, label, **options)
        return tube

    # ---------------------------------------------------------------------------------------- the walls of the body
    def cavity(self, block: Block) -> Array:
        """Distance to the inner wall of the trunk: narrower at the waist and up the chest."""
        narrow = (
            1
            - np.float32(0.07) * np.exp(-(((block.z + 60) / 60) ** 2))
            - np.float32(0.0011) * np.maximum(block.z - 70, 0)
        )
        return ellipse_distance(block.x / narrow, block.y - 4, 131.0, 88.0)

    def basin(self, block: Block) -> Array:
        """The same, but below the iliac crests muscle and bone leave a narrower basin."""
        low = 1 / (1 + np.exp((block.z + 195) / 14))  # 0 in the abdomen, 1 in the pelvis
        return self.cavity(
            Block(
                block.x * (1 + np.float32(0.36) * low),
                (block.y - 92) * (1 + np.float32(0.2) * low) + 92,
                block.z,
                block.width,
            )
        )

    def roof(self, block: Block) -> Array:
        """Height above the diaphragm, about in mm."""
        right, left = self.domes
        y = block.y - 8
        back = np.where(y < 0, np.float32(0.0085), np.float32(0.008)) * y * y
        domes = union(
            block.z - (right - np.float32(0.0135) * (block.x - 60) ** 2 - back),
            block.z - (left - np.float32(0.0105) * (block.x + 66) ** 2 - back),
            25,
        )
        return domes / np.float32(1.7)

    def skin(self, block: Block) -> Array:
        """Distance to the skin: fat lies in front and on the flanks, muscle at the back."""
        wide, deep = 131 + self.thick + 0.55 * self.fat + 8, 88 + self.thick + 0.75 * self.fat + 13
        narrow = (
            1
            - np.float32(0.04) * np.exp(-(((block.z + 60) / 70) ** 2))
            - np.float32(0.0005) * np.maximum(block.z - 70, 0)
        )
        return ellipse_distance(block.x / narrow, block.y - (-9 + 0.25 * self.fat), wide, deep)

    def wall(self, *, table: bool) -> None:
        if table:
            low = -9 + 0.25 * self.fat - (88 + self.thick + 0.75 * self.fat + 13) - 14

            def top(block: Block) -> Array:
                return np.abs(block.y - low - np.float32(0.0011) * block.x**2) - 5

            self.add(top, EVERYWHERE, [(0, "table"), (1.6, 0.9 * self.tissues["air"])])
        self.add(self.skin, EVERYWHERE, [(0, "skin"), (2, "fat")])

        def muscle(block: Block) -> Array:
            front = np.exp(-(((block.y - 70) / 40) ** 2))  # the flat muscles of the belly
            return self.cavity(block) - (self.thick - np.float32(0.35 * self.thick) * front)

        self.add(muscle, EVERYWHERE, [(0, "muscle")])
        for side in (-1, 1):
            back = Tube.through([(side * 34, -92, -FAR / 20), (side * 36, -92, 0), (side * 34, -94, FAR / 20)], 21)
            self.add(back, back.box(), [(0, "muscle")])
        self.add(self.basin, EVERYWHERE, [(0, "fat")])

    def chest(self) -> None:
        def lung(block: Block) -> Array:
            middle = 27 - np.hypot(block.x + 4, np.float32(0.45) * (block.y + 30))
            return common(common(self.cavity(block) + 3, -self.roof(block) + 3, 8), middle, 12)

        self.add(lung, ((-140, -100, 10), (140, 110, FAR)), [(0, "lung")])

        def diaphragm(block: Block) -> Array:
            return np.maximum(np.abs(self.roof(block) - 1.5) - 1.8, self.cavity(block) + 1)

        self.add(diaphragm, ((-140, -100, 10), (140, 110, 140)), [(0, "muscle")])
        heart, frame = (-24.0, 26.0, 138.0 + self.rng.normal(0, 5)), turn(0, 25, 15)
        self.add(
            ellipsoid(heart, (60, 44, 34), frame),
            around(heart, 66),
            [(-3, "fat"), (0, "myocardium"), (9, "blood")],
        )
        for _ in range(14):  # vessels of the lungs
            side = self.rng.choice((-1, 1))
            start = np.array((side * self.rng.uniform(45, 95), self.rng.uniform(-50, 40), 165))
            end = start + (side * self.rng.uniform(0, 22), self.rng.uniform(-25, 10), -self.rng.uniform(30, 60))
            vessel = Tube.through([start, (start + end) / 2 + self.rng.normal(0, 4, 3), end], [3.0, 2.2, 1.2])

            def inside(block: Block, vessel: Tube = vessel) -> Array:
                return np.maximum(vessel(block), lung(block) + 2)

            self.add(inside, vessel.box(), [(0, "muscle")])

    def skeleton(self) -> None:
        step, first = 35.0, self.rng.uniform(-17, 17)

        def column(block: Block) -> Array:
            height = (block.z - first) / step
            height = np.abs(height - np.round(height)) * np.float32(2)  # 0 in the middle of a body, 1 in the disc
            waist = 1 + np.float32(0.12) * height**2
            lordosis = np.float32(6) * np.cos(np.clip((block.z + 60) / 110, -3, 3))
            return ellipse_distance(block.x / waist, (block.y + 58 - lordosis) / waist, 22.5, 16.5)

        def vertebra(block: Block) -> Array:
            height = block.z - first
            height = np.abs(height - np.round(height / step) * step)
            return common(column(block), height - 13.5, 4)

        sacrum = -185.0
        self.add(column, ((-35, -90, sacrum - 5), (35, -25, FAR)), [(0, "disc")])
        self.add(vertebra, ((-35, -90, sacrum - 5), (35, -25, FAR)), [(0, "cortex"), (2, "bone")])

        def arch(block: Block) -> Array:
            height = block.z - first
            height = np.abs(height - np.round(height / step) * step)
            spine = ellipse_distance(block.x, block.y + 97, 4.5, 15)
            ring = ellipse_distance(block.x, block.y + 79, 16, 12)
            wing = ellipse_distance(np.abs(block.x) - 26, block.y + 80 + np.float32(0.1) * np.abs(block.x), 15, 4.5)
            return common(union(union(spine, ring, 3), wing, 3), height - 11, 4)

        self.add(arch, ((-50, -120, sacrum), (50, -60, FAR)), [(0, "cortex"), (2.5, "bone")])

        def canal(block: Block) -> Array:
            return ellipse_distance(block.x, block.y + 78, 9.5, 8)

        self.add(canal, ((-12, -90, sacrum - 40), (12, -65, FAR)), [(0, "fat"), (1.5, "cord")])
        low, gap = self.rng.uniform(-22, -8), self.rng.uniform(26, 30)

        def ribs(block: Block) -> Array:
            around_trunk = np.arctan2(np.abs(block.x) / 131, -(block.y - 4) / 88)  # 0 at the spine, pi in front
            height = (block.z + np.float32(34) * around_trunk - low - 24) / np.float32(gap)
            nearest = np.maximum(np.round(height), 0)
            slanted = np.float32(0.8 * gap) * (height - nearest)
            depth = self.cavity(block) - np.float32(0.45 * self.thick)
            end = 45 * (around_trunk - (1.3 + np.float32(0.42) * np.minimum(nearest, 3)))
            spine = 55 * (0.3 - around_trunk)
            return np.maximum(np.hypot(slanted * np.float32(0.75), depth) - 4.6, np.maximum(end, spine))

        self.add(ribs, ((-170, -130, -130), (170, 130, FAR)), [(0, "cortex"), (1.8, "bone")])
        for side in (-1, 1):
            psoas = [(side * 26, -50, 15), (side * 34, -48, -50), (side * 46, -42, -130), (side * 62, -12, -230)]
            self.tube([*psoas, (side * 72, 8, -300)], [7, 13, 20, 21, 17], [(0, "muscle")])
            crus = [(side * 14, -38, 60), (side * 11, -36, 30), (side * 12, -40, -5)]
            self.tube(crus, [6, 5, 2.5], [(0, "muscle")])

    # -------------------------------------------------------------------------------------------------- the organs
    def bowel(self) -> None:
        rng = self.rng
        content = {"fluid": "fluid", "stool": "stool"}
        for _ in range(rng.integers(18, 28)):  # loops of the small bowel
            here = np.array((rng.uniform(-70, 70), rng.uniform(0, 60), rng.uniform(-205, -30)))
            path = [here]
            for _ in range(5):
                here = np.clip(here + rng.normal(0, (26, 16, 18)), (-76, -6, -215), (76, 70, -20))
                path.append(here + rng.normal(0, 2, 3))  # two points at a limit are not one
            radius = rng.uniform(9, 14)
            self.tube(path, radius, [(0, "gut wall"), (2.6, content[rng.choice(("fluid", "stool"))])])
        for start, end in (
            ((10, 8, -20), (25, 35, -150)),
            ((4, 8, -25), (-30, 35, -140)),
            ((6, 6, -15), (0, 30, -190)),
        ):
            middle = (np.add(start, end) / 2 + rng.normal(0, 8, 3)).tolist()
            self.tube([start, middle, end], [4, 3, 2], [(0, "vena cava")])
        sag = rng.uniform(-55, -15)
        colon: tuple[Curve, ...] = (
            [(88, 5, -175), (94, 0, -120), (97, -5, -70), (93, 0, -38), (80, 30, -34)],
            [(80, 32, -34), (45, 58, sag + 8), (0, 66, sag), (-45, 58, sag + 22), (-82, 25, 8)],
            [(-82, 25, 8), (-98, -15, 12), (-100, -28, -35), (-98, -22, -100), (-92, -12, -165)],
            [(-92, -12, -165), (-80, 15, -205), (-35, 25, -215), (10, 0, -222), (8, -38, -240), (0, -46, -300)],
        )
        for points, radius in zip(colon, (22, 18, 15, 14), strict=True):
            tube = Tube.through(self.jitter(points, 5), radius * rng.uniform(0.8, 1.1), samples=4)
            phase = rng.uniform(0, 6.28)

            def haustra(block: Block, tube: Tube = tube, phase: float = phase) -> Array:
                swing = (block.z + block.x) / np.float32(5.2) + phase
                return tube(block) + np.float32(1.6) * np.cos(swing)

            self.add(haustra, tube.box(3), [(0, "gut wall"), (2.8, "stool")])
            air = rng.uniform(0, 7)

            def bubble(block: Block, tube: Tube = tube, air: float = air) -> Array:
                lifted = Block(block.x, block.y - np.float32(6), block.z, block.width)
                return np.maximum(tube(lifted) + 12.5 - air, tube(block) + 4)

            self.add(bubble, tube.box(), [(0, "gas")])

    def liver(self, tumours: int) -> None:
        rng = self.rng
        big, tip = rng.uniform(0.96, 1.12), rng.uniform(-78, -34)
        reach = rng.uniform(48, 84)  # of the left lobe
        angle = rng.normal(0, 6)
        right = ellipsoid((60, 0, 46), (80 * big, 82, 80 * big))
        left = ellipsoid((-4, 36, 74), (reach, 34, 27), turn(0, 8, angle))

        def liver(block: Block) -> Array:
            lobes = union(right(block), left(block), 18)
            shell = common(self.roof(block) + 4, self.cavity(block) + 5, 10)
            lateral = np.clip((118 - block.x) / 70, -0.3, 3)
            under = tip + np.float32(86) * (1 - np.exp(-lateral)) - np.float32(0.12) * (block.y - 20)
            spine = 42 - np.hypot(block.x + 8, block.y + 52)
            return common(common(lobes, shell, 10), common((under - block.z) / np.float32(1.35), spine, 14), 16)

        box: Box = ((-100, -90, -70), (140, 100, 130))
        self.add(liver, box, [(0, "liver")], "liver")
        hilum = (30.0, 2.0, 36.0)
        for end in ((92, 10, 30), (85, -35, 55), (80, 25, 75), (-25, 38, 72), (95, -5, 5), (62, -30, 80)):
            middle = np.add(hilum, end) / 2 + rng.normal(0, 6, 3)
            self.branch([hilum, middle, np.asarray(end) + rng.normal(0, 6, 3)], [6, 4, 1.8])
        for end in ((85, -5, 60), (45, 45, 70), (-20, 40, 78)):  # hepatic veins run to the caval vein
            middle = np.add((22, -14, 92), end) / 2 + rng.normal(0, 5, 3)
            self.branch([(22, -14, 92), middle, np.asarray(end) + rng.normal(0, 5, 3)], [5.5, 4, 1.8])
        for _ in range(tumours):
            self.tumour(liver, box)

    def branch(self, points: Curve, radii: Vector) -> None:
        """A vessel inside the liver: it stays part of the liver."""
        self.tube(points, radii, [(0, "liver vessel")], "", within="liver", softness=1.5)

    def tumour(self, liver: Distance, box: Box) -> None:
        rng = self.rng
        radius = float(np.exp(rng.uniform(np.log(5), np.log(26))))
        while True:  # a third of the box is liver
            centre = rng.uniform(*box)
            x, y, z = (np.full((1, 1, 1), place, np.float32) for place in centre)
            spot = Block(x, y, z, 1.0)
            if liver(spot).item() < -min(0.6 * radius, 9):
                break
        axes = radius * rng.uniform(0.75, 1.2, 3)
        lump = ellipsoid(centre, axes, turn(*rng.uniform(-90, 90, 3)))
        swell = rng.uniform(-0.6, 0.6, 3) * radius
        second = ellipsoid(centre + swell, axes * 0.62)

        def shape(block: Block) -> Array:
            return union(lump(block), second(block), 0.4 * radius)

        layers: list[tuple[float, str | float]] = [(0, "tumour rim"), (0.18 * radius, "tumour")]
        if rng.random() < 0.3:  # dead in the middle
            layers.append((0.55 * radius, 0.5 * (self.tissues["tumour"] + self.tissues["fluid"])))
        self.add(shape, around(centre, 2.2 * radius), layers, "tumour", within="liver", softness=rng.uniform(0, 3))

    def stomach(self) -> None:
        rng = self.rng
        full = rng.uniform(0.72, 1.12)
        path = self.jitter([(-62, -22, 84), (-62, -4, 66), (-60, 22, 44), (-42, 40, 22), (-14, 42, 8), (12, 34, 8)], 4)
        path = np.concatenate([path, [(30, 28, 10)]])
        radii = np.multiply([30, 31, 27, 22, 17, 13, 8], [full] * 5 + [1, 1])
        tube = Tube.through(path, radii)

        def shape(block: Block) -> Array:
            return common(tube(block), common(self.roof(block) + 6, self.cavity(block) + 6, 6), 8)

        content = self.tissues["fluid"] + rng.uniform(0, 1) * (self.tissues["gut wall"] - self.tissues["fluid"])
        self.add(shape, tube.box(3), [(0, "gut wall"), (rng.uniform(3.5, 5.5), content)], "stomach")
        level = rng.uniform(12, 42)  # gas lies in front of the fluid: the patient is on the back

        def gas(block: Block) -> Array:
            return np.maximum(shape(block) + 5, level - block.y)

        self.add(gas, tube.box(), [(0, "gas")], "")

    def spleen(self, *, kept: bool) -> None:
        if not kept:
            return
        rng = self.rng
        size = rng.uniform(0.82, 1.18)
        centre = (-92.0, -38.0, 40.0 + rng.normal(0, 6))
        outer = ellipsoid(centre, (34 * size, 50 * size, 56 * size), turn(12, -14, -24))
        inner = ellipsoid((-58, -8, 42), (27, 42, 60), turn(0, -10, -20))

        def shape(block: Block) -> Array:
            body = common(outer(block), common(self.cavity(block) + 5, self.roof(block) + 5, 5), 8)
            return common(body, -inner(block), 8)

        box = around(centre, 72)
        self.add(lambda block: shape(block) - 3, box, [(0, "fat")])
        self.add(shape, box, [(0, "spleen")], "spleen")

    def kidneys(self, lacking: set[str]) -> None:
        rng = self.rng
        for side, name in ((1, "right kidney"), (-1, "left kidney")):
            size, pose = rng.uniform(0.86, 1.12), turn(8, side * 11, side * 22)
            if lacking & {"right kidney", "left kidney"}:
                size *= 1.12  # the other one grows
            centre = np.array((side * 63.0, -50.0, -22.0 if side > 0 else -8.0)) + rng.normal(0, (3, 2, 7))
            if name in lacking:
                continue
            outer = ellipsoid(centre, np.multiply((29, 25, 54), size), pose)
            hollow = centre + pose @ (-side * 29 * size, 6, 0)
            sinus = ellipsoid(hollow, (17 * size, 11, 22 * size), pose)

            def bean(block: Block, outer: Distance = outer, sinus: Distance = sinus) -> Array:
                return common(outer(block), -sinus(block), 7)

            def capsule(block: Block, outer: Distance = outer) -> Array:
                rim = np.float32(4 + 5 * self.visceral)
                return np.maximum(outer(block) - rim, self.cavity(block) + 1)

            box = around(centre, 66 * size)
            self.add(capsule, box, [(0, "fat")])
            self.add(bean, box, [(0, "renal cortex"), (7 * size, "renal medulla")], name, softness=1.0)
            ureter: Curve = [hollow, hollow + (-side * 8, 2, -18), (side * 36, -34, -95), (side * 42, -16, -180)]
            self.tube(ureter, [6, 4.5, 2, 2], [(0, "renal pelvis")])

    def vessels(self) -> None:
        rng = self.rng
        wide = rng.uniform(8.5, 12.5)
        sway = rng.normal(0, 3, 2)
        aorta = [
            (-20, -34, 190),
            (-17, -33, 120),
            (-9, -29, 60),
            (-6 + sway[0], -25, 0),
            (-3, -25, -50),
            (-2, -26, -96),
        ]
        cava = [(19, -6, 128), (22, -14, 92), (21, -20, 50), (19, -23, 0), (17, -25, -50), (13, -28, -104)]
        for side in (-1, 1):
            arteries = [(-2, -26, -94), (side * 18, -24, -125), (side * 38, -22, -165), (side * 55, 8, -225)]
            self.tube([*arteries, (side * 66, 36, -300)], [8, 6.5, 6, 5.5, 5], [(0, "aorta")])
            veins = [(13, -29, -102), (side * 18 + 3, -33, -132), (side * 40, -32, -172), (side * 52, -2, -230)]
            self.tube([*veins, (side * 60, 28, -300)], [8, 7, 7, 6.5, 6], [(0, "vena cava")])
            kidney = [(-6, -25, 2), (side * 26, -33, -4), (side * 44, -44, -14)]
            self.tube(kidney, [3, 2.6, 2.4], [(0, "aorta")])
            vein = [(17, -22, -2), (side * 24 + 4, -27, -6), (side * 45, -42, -16)]
            self.tube(vein, [4.5, 4, 3.5], [(0, "vena cava")])
        flat = rng.uniform(1.0, 1.5)  # a caval vein is flattened from front to back
        tube = Tube.through(np.multiply(self.jitter(cava, 2), (1, flat, 1)), wide * rng.uniform(0.95, 1.15))

        def vein_shape(block: Block) -> Array:
            return tube(Block(block.x, block.y * np.float32(flat), block.z, block.width)) / np.float32(flat**0.5)

        low, high = tube.box()
        box: Box = ((low[0], low[1] / flat - 2, low[2]), (high[0], high[1] / flat + 2, high[2]))
        self.add(vein_shape, box, [(0, "vena cava")], "inferior vena cava")
        bent = self.jitter(aorta, 2.5)
        self.tube(bent, [12, 11.5, 11, 10, 9, 8.5], [(-1, "fat"), (0, "gut wall"), (1.2, "aorta")], "aorta")
        self.tube([(-6, -18, 34), (-5, -4, 33), (-16, 2, 36)], [4, 3.5, 2.5], [(0, "aorta")])  # coeliac trunk
        self.tube([(-5, -20, 20), (-3, -3, 8), (-3, 5, -30), (3, 18, -90)], [4, 3.6, 3.2, 2], [(0, "aorta")])

    def pancreas(self) -> None:
        rng = self.rng
        thick = rng.uniform(0.78, 1.15)
        path = self.jitter(
            [(36, 2, -30), (34, 6, -12), (22, 12, 4), (4, 14, 16), (-20, 6, 26), (-46, -12, 36), (-72, -26, 44)], 3
        )
        tube = Tube.through(path, np.multiply([11, 15, 13, 10, 11.5, 12, 9.5], thick))
        phase = rng.uniform(0, 6.28, 3)

        def lobules(block: Block) -> Array:
            bumps = (
                np.sin(block.x / 2.4 + phase[0]) + np.sin(block.y / 2.1 + phase[1]) + np.sin(block.z / 2.6 + phase[2])
            )
            return tube(block) + np.float32(0.5 + 0.9 * self.visceral) * bumps

        self.add(lambda block: tube(block) - 2.5, tube.box(4), [(0, "fat")])
        self.add(lobules, tube.box(4), [(0, "pancreas")], "pancreas")
        back = path[2:] + (0, -8.5 * thick, 1)
        splenic = np.concatenate([[(16, 3, 12)], back[1:], [(-84, -30, 47)]])
        join = np.concatenate([[(30, 4, 40), (24, 2, 28)], splenic[:1]])
        veins = (Tube.through(join, [7.5, 7.5, 7]), Tube.through(splenic, [6.5, 5.2, 4.8, 4.6, 4.4, 3.8]))

        def shape(block: Block) -> Array:
            return union(veins[0](block), veins[1](block), 4)

        boxes = np.array([vein.box(2) for vein in veins])
        box = corners(boxes[:, 0].min(0), boxes[:, 1].max(0))
        self.tube([(16, 3, 12), (12, 6, -12), (10, 14, -60), (6, 24, -110)], [6, 5.5, 4.5, 3], [(0, "portal vein")])
        self.add(shape, box, [(0, "portal vein")], "portal and splenic veins")

    def duodenum(self) -> None:
        rng = self.rng
        path = self.jitter(
            [(30, 27, 10), (44, 18, 10), (55, 4, 2), (56, -8, -24), (46, -12, -50), (18, -6, -60), (-8, -6, -58)], 2.5
        )
        path = np.concatenate([path, [(-28, -6, -42), (-32, 4, -24)]])
        radii = rng.uniform(0.82, 1.12) * np.array([9, 12, 11, 11, 11, 9.5, 9, 9, 9])
        inside = self.tissues["fluid"] + rng.uniform(0.3, 1) * (self.tissues["gut wall"] - self.tissues["fluid"])
        tube = self.tube(path, radii, [(-1.2, "fat"), (0, "gut wall"), (3.2, inside)], "duodenum")
        if rng.random() < 0.4:
            spot = tube.points[6] + (0, 3, 0)
            self.add(ellipsoid(spot, (4, 3, 5)), around(spot, 6), [(0, "gas")], "")

    def adrenals(self, lacking: set[str]) -> None:
        rng = self.rng
        thick = rng.uniform(2.7, 3.8)
        glands = {  # apex and the ends of the limbs, seen from above: a V on the right, a Y on the left
            "right adrenal": ((25.0, -33.0), ((34, -48), (26, -50))),
            "left adrenal": ((-33.0, -31.0), ((-46, -44), (-32, -46))),
        }
        for name, (apex, ends) in glands.items():
            height, low = rng.uniform(11, 15), (32 if apex[0] > 0 else 34) + rng.normal(0, 2)
            turned = rng.normal(0, 1.5, 2)
            if name in lacking:
                continue
            plates = []
            for end, reach in zip(ends, (1.0, rng.uniform(0.7, 0.95)), strict=True):
                tip = np.add(apex, reach * (np.subtract(end, apex) + turned))
                middle = (*np.add(apex, tip) / 2, low)
                length = float(np.hypot(*(tip - apex)))
                angle = np.degrees(np.arctan2(tip[1] - apex[1], tip[0] - apex[0]))
                plates.append(ellipsoid(middle, (length / 2 + 3, thick, height), turn(0, 0, angle)))
            body = ellipsoid((*apex, low + 1), (thick + 1.2, thick + 1.6, height * 0.8))

            def gland(block: Block, plates: list[Distance] = plates, body: Distance = body) -> Array:
                return union(union(plates[0](block), plates[1](block), 2), body(block), 2)

            box = around((*np.mean([apex, *ends], 0), low), 26)
            self.add(gland, box, [(-3, "fat"), (0, "adrenal")], name)

    def gallbladder(self) -> None:
        rng = self.rng
        full = rng.uniform(0.55, 1.2)
        path = self.jitter([(40, 14, 30), (48, 24, 20), (58, 36, 6), (66, 44, -8 - 10 * full)], 3)
        tube = Tube.through(path, np.multiply([4.5, 9, 13, 12], full) + (0, 1, 1, 1))
        self.add(lambda block: tube(block) - 1.5, tube.box(2), [(0, "fat")])
        self.add(tube, tube.box(), [(0, "gut wall"), (1.3, "bile")], "gallbladder")
        if rng.random() < 0.25:  # a stone at the lowest place
            spot = tube.points[-1] + (0, -4 * full, 0)
            self.add(ellipsoid(spot, (4, 3.5, 4)), around(spot, 6), [(0, 2.2 * self.tissues["liver"])], "")

    def oesophagus(self) -> None:
        rng = self.rng
        path = self.jitter([(-2, -20, 190), (-4, -18, 140), (-8, -15, 105), (-16, -11, 90), (-32, -13, 81)], 1.5)
        tube = self.tube(path, [8.5, 8.5, 8, 8, 8], [(-1, "fat"), (0, "gullet")], "oesophagus")
        if rng.random() < 0.5:
            spot = tube.points[6]
            self.add(ellipsoid(spot, (2.5, 2, 12)), around(spot, 13), [(0, "gas")], "")

    def pelvis(self, *, womb: bool, kept: bool) -> None:
        rng = self.rng
        sacrum = [(0, -62, -180), (0, -78, -215), (0, -88, -250), (0, -82, -285)]
        tube = Tube.through(sacrum, [27, 23, 17, 8])

        def plate(block: Block) -> Array:
            return common(tube(block), np.abs(block.y + 72 + (block.z + 215) * np.float32(-0.25)) - 15, 6)

        self.add(plate, tube.box(), [(0, "cortex"), (2.5, "bone")])
        for side in (-1, 1):
            wing = ellipsoid((side * 92, -28, -205), (9, 56, 58), turn(0, side * -16, side * 34))
            self.add(wing, around((side * 92, -28, -205), 75), [(0, "cortex"), (2.5, "bone")])
            bar = Tube.through(
                [(side * 78, -28, -245), (side * 88, -14, -290), (side * 60, 22, -315), (0, 42, -330)], 15
            )
            self.add(bar, bar.box(), [(0, "cortex"), (3, "bone")])
            head = (side * 97.0, -10.0, -292.0)
            self.add(ellipsoid(head, (23, 23, 23)), around(head, 24), [(0, "cortex"), (2, "bone")])
            rear = ellipsoid((side * 74, -92, -262), (62, 36, 78), turn(0, 0, side * 24))

            def gluteal(block: Block, rear: Distance = rear, wing: Distance = wing) -> Array:
                return np.maximum(np.maximum(rear(block), self.skin(block) + 12 + 0.5 * self.fat), 1 - wing(block))

            self.solids.insert(2, Solid(gluteal, around((side * 82, -84, -250), 95), ((0, self.tissues["muscle"]),)))
        fill = rng.uniform(0.6, 1.15)
        bladder = (rng.normal(0, 3), 26.0, -286.0 + 24 * fill)
        vesicle = ellipsoid(bladder, (40 * fill, 30 * fill, 28 * fill), turn(12, 0, 0))
        if womb:
            centre, axes, pose = (rng.normal(0, 5), -8.0, -243.0), (27, 21, 34), turn(38, rng.normal(0, 6), 0)
        else:
            centre, axes, pose = (rng.normal(0, 2), 10.0, -322.0), (25, 18, 20), turn(10, 0, 0)
        gland = ellipsoid(centre, np.multiply(axes, rng.uniform(0.82, 1.15)), pose)

        def shape(block: Block) -> Array:
            return common(vesicle(block), 2 - gland(block), 6) if womb else vesicle(block)  # it gives way to a womb

        self.add(lambda block: shape(block) - 2, around(bladder, 48), [(0, "fat")])
        if kept:
            self.add(
                gland, around(centre, 44), [(-2, "fat"), (0, "uterus" if womb else "prostate")], "prostate or uterus"
            )
        self.add(shape, around(bladder, 48), [(0, "gut wall"), (2.5, "urine")], "bladder")
