"""A short-axis cine stack of a heart in its chest, drawn from random parameters.

`draw_patient` goes parameters -> tissues of one slice at one phase -> signal -> acquisition. Frames of reference:

* heart: origin on the long axis of the left ventricle, z in mm from its apex (0) to the valve plane (`Heart.length` at
  end diastole) and on into the atria; the septum lies at angle pi, the free wall of the left ventricle at 0.
* picture: x to the right of the picture (the patient's left), y downwards (posterior, inferior), mm from the heart.

Slice 0 is the apical (inferior) end. End diastole is contraction 0, end systole contraction 1. Myocardium is
incompressible: where the cavity shrinks, the wall thickens. Labels follow ACDC: 1 RV cavity, 2 LV myocardium, 3 LV
cavity with its papillary muscles and trabeculae; atria, vessels and the thin wall of the RV are background.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medlib.data.phantoms.acquisition import banding, coil_field, scan
from medlib.data.phantoms.shapes import (
    Array,
    Ellipsoid,
    Grid,
    Pose,
    coverage,
    ellipse_distance,
    paint,
    rim,
    smooth_noise,
)

GROUPS = ("NOR", "DCM", "HCM", "MINF", "RV")

BODY_SUBSLICES = 2  # planes averaged over a slice's thickness for the body
HEART_SUBSLICES = 3  # the same for the heart and its labels; odd, so that a label has a middle
SLIVER = 40  # mm2; a smaller section of the RV is one that nobody would outline


@dataclass(frozen=True)
class Difficulty:
    """How hard the pictures are; 0 switches a difficulty off, 1 is as hard as real hearts look.

    The defaults are what `data/README.md` has measured: a task that tells label ratios apart within minutes.
    """

    noise: float = 0.015  # mean sigma of the Rician noise as a share of the blood's signal; x0.5..x1.6 between patients
    bias: float = 0.5  # strength of the receive-coil falloff and of the smooth ripple on it
    contrast: float = 0.9  # spread of every tissue's signal and of the contrast curve between patients
    pose: float = 0.7  # spread of heart rotation (+-40 degrees at 1), position and slice shift between breath-holds
    shape: float = 0.9  # spread of ventricle outlines, papillary muscles and trabeculae
    clutter: float = 0.3  # number of look-alikes: rings (stomach, bowel), blood pools, lung vessels


DIFFICULTY = Difficulty()


# ---------------------------------------------------------------------------------------------------- parameters
@dataclass(frozen=True)
class Range:
    """Limits of a uniform draw."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        return float(rng.uniform(self.low, self.high))


@dataclass(frozen=True)
class Group:
    """What sets a group of patients apart, at end diastole."""

    cavity: Range = Range(22, 27)  # radius of the LV cavity at the equator, mm
    wall: Range = Range(7, 10)  # LV wall, mm
    septum: Range = Range(0, 1.5)  # extra thickness of the septum, mm
    length: Range = Range(66, 92)  # LV apex to valve plane, mm
    shortening: Range = Range(0.27, 0.37)  # radius of the LV cavity lost at end systole, share
    longitudinal: Range = Range(0.10, 0.16)  # length lost at end systole, share
    scar: Range = Range(0, 0)  # wall thickness lost inside the scar, share (0: no scar)
    bulge: Range = Range(22, 31)  # how far the RV reaches beyond the LV's outer wall at the base, mm
    rv_shortening: Range = Range(0.36, 0.5)  # bulge lost at end systole, share
    flattening: Range = Range(0, 0.04)  # septum pushed towards the LV, share of the radius


GROUP_RANGES = {
    "NOR": Group(),
    "DCM": Group(
        cavity=Range(31, 38),
        wall=Range(6, 8.5),
        length=Range(86, 106),
        shortening=Range(0.05, 0.15),
        longitudinal=Range(0.03, 0.07),
        bulge=Range(20, 34),
        rv_shortening=Range(0.18, 0.4),
    ),
    "HCM": Group(
        cavity=Range(19, 24),
        wall=Range(11, 14),
        septum=Range(4, 9),
        length=Range(66, 90),
        shortening=Range(0.38, 0.5),
        bulge=Range(17, 26),
    ),
    "MINF": Group(
        cavity=Range(25, 32),
        wall=Range(7.5, 10),
        length=Range(80, 100),
        shortening=Range(0.16, 0.24),
        longitudinal=Range(0.05, 0.1),
        scar=Range(0.4, 0.65),
    ),
    "RV": Group(
        cavity=Range(20, 25),
        bulge=Range(33, 45),
        rv_shortening=Range(0.18, 0.32),
        flattening=Range(0.06, 0.2),
    ),
}


@dataclass(frozen=True)
class Heart:
    """One heart. Lengths in mm at end diastole, angles in radian in the heart's frame."""

    group: str
    cavity: float  # LV cavity radius at the equator
    wall: float  # LV wall at the equator
    septum: float  # extra wall at the septum
    length: float  # LV apex to valve plane
    equator: float  # where the LV is widest, share of the length
    outline: tuple[float, ...]  # cos 2a, sin 2a, cos 3a, sin 3a of the outline, share of the radius
    shortening: float  # cavity radius lost at end systole, share
    longitudinal: float  # length lost at end systole, share
    flattening: float  # septum pushed in, share of the radius
    scar: float  # wall lost in the scar, share
    scar_angle: float  # middle of the scar
    scar_width: float  # half width of the scar
    scar_reach: tuple[float, float]  # scar from .. to, share of the length
    valve_tilt: tuple[float, ...]  # slope of the valve plane along x, y
    bulge: float  # RV beyond the LV's outer wall, at the base
    rv_shortening: float  # bulge lost at end systole, share
    rv_apex: float  # where the RV begins, share of the length
    rv_height: float  # RV between its corners, share of the LV's outer radius
    rv_outflow: float  # shift of the RV towards the front at the base
    rv_top: float  # tricuspid and pulmonary plane above the mitral plane
    papillary: tuple[tuple[float, float, float], ...]  # angle, radius in mm, share of the cavity radius it stands at
    trabeculae: float  # strength of the meshwork inside RV and LV, 0..1
    fat: float  # epicardial fat, mean thickness
    atrium: float  # radius of the left atrium


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)  # plain floats keep float32 arrays float32


def draw_heart(rng: np.random.Generator, group: str, difficulty: Difficulty) -> Heart:
    """A heart of `group` from its parameter ranges."""
    ranges = GROUP_RANGES[group]
    shape = difficulty.shape
    start = rng.uniform(0.0, 0.35)
    return Heart(
        group=group,
        cavity=ranges.cavity.draw(rng),
        wall=ranges.wall.draw(rng),
        septum=ranges.septum.draw(rng),
        length=ranges.length.draw(rng),
        equator=rng.uniform(0.66, 0.8),
        outline=_floats(shape * rng.normal(0, (0.035, 0.035, 0.018, 0.018))),
        shortening=ranges.shortening.draw(rng),
        longitudinal=ranges.longitudinal.draw(rng),
        flattening=ranges.flattening.draw(rng),
        scar=ranges.scar.draw(rng),
        scar_angle=rng.uniform(-np.pi, np.pi),
        scar_width=rng.uniform(0.5, 0.95),
        scar_reach=(start, start + rng.uniform(0.4, 0.65)),
        valve_tilt=_floats(rng.normal(0, 0.1, 2).clip(-0.2, 0.2)),
        bulge=ranges.bulge.draw(rng),
        rv_shortening=ranges.rv_shortening.draw(rng),
        rv_apex=rng.uniform(0.18, 0.32),
        rv_height=rng.uniform(0.95, 1.2),
        rv_outflow=rng.uniform(2, 14),
        rv_top=rng.uniform(-3, 9),
        papillary=tuple(
            (angle + shape * rng.normal(0, 0.25), rng.uniform(3.0, 5.5), rng.uniform(0.55, 0.8))
            for angle in (0.9, -1.1, *rng.uniform(-1.6, 1.6, rng.integers(0, 2)))
        ),
        trabeculae=rng.uniform(0.3, 1.0) * shape,
        fat=rng.uniform(2, 9),
        atrium=rng.uniform(20, 29),
    )


# mean signal (blood in the LV is 1) and relative spread between patients
TISSUES = {
    "myocardium": (0.34, 0.16),
    "rv_blood": (0.86, 0.1),
    "lung": (0.05, 0.4),
    "air": (0.0, 0.0),
    "fat": (0.85, 0.4),
    "muscle": (0.27, 0.22),
    "liver": (0.38, 0.25),
    "spleen": (0.5, 0.25),
    "marrow": (0.5, 0.3),
    "fluid": (1.15, 0.25),
    "wall": (0.33, 0.2),  # of stomach and bowel
    "omentum": (0.6, 0.4),  # fat between the bowels, mixed with everything else
    "vessel": (1.0, 0.12),  # aorta, caval vein, vessels of lung and liver
}
Tissues = dict[str, float]


def draw_tissues(rng: np.random.Generator, difficulty: Difficulty) -> Tissues:
    """The signal of each tissue in one patient; a patient's contrast curve (gamma) bends them all."""
    gamma = np.exp(difficulty.contrast * rng.normal(0, 0.16))
    signals = {"blood": 1.0}
    for name, (mean, spread) in TISSUES.items():
        signals[name] = float((mean * np.exp(difficulty.contrast * spread * rng.normal())) ** gamma)
    return signals


@dataclass(frozen=True)
class Body:
    """The chest around the heart in the picture's frame, mm. `taper` is what the chest loses from base to apex."""

    centre: tuple[float, float]
    inside: tuple[float, float]  # half axes of the inner chest wall at the base
    taper: float  # share of the half axes lost over the length of the heart
    muscle: float  # chest wall muscle
    fat: float  # fat under the skin
    fat_lobes: tuple[float, ...]  # cos a, sin a, cos 2a, sin 2a of the fat's thickness, share
    outline: tuple[float, ...]  # cos 2a, sin 2a, cos 3a, sin 3a of the chest wall, mm
    ribs: tuple[tuple[float, float], ...]  # angle, radius
    diaphragm: tuple[float, float, float]  # depth below the heart at the base, at the apex; tilt
    organs: tuple[Ellipsoid, ...]  # inside the abdomen
    vessels: tuple[Ellipsoid, ...]  # spine, great vessels
    lungs: tuple[Ellipsoid, ...]  # vessels of the lungs
    arm: Ellipsoid | None


def draw_body(rng: np.random.Generator, heart: Heart, tissues: Tissues, difficulty: Difficulty) -> Body:
    """A chest that fits the heart."""
    reach = heart.cavity + heart.wall  # outer radius of the LV
    width, height = rng.uniform(112, 165), rng.uniform(95, 135)
    front = reach + rng.uniform(2, 20) + 0.6 * heart.bulge  # heart centre to the inner chest wall
    centre = (rng.uniform(-25, 20), height - front)
    floor = reach + rng.uniform(2, 30), reach * 0.35 + rng.uniform(-4, 12)
    ribs = _floats(np.arange(-2.9, 2.9, rng.uniform(0.3, 0.45)))
    return Body(
        centre=centre,
        inside=(width, height),
        taper=rng.uniform(0.08, 0.3),
        muscle=rng.uniform(5, 13),
        fat=rng.uniform(4, 32),
        fat_lobes=_floats(rng.normal(0, (0.3, 0.25, 0.2, 0.2))),
        outline=_floats(rng.normal(0, (5, 5, 5, 5))),
        ribs=tuple((angle + rng.normal(0, 0.06), rng.uniform(3, 6)) for angle in ribs),
        diaphragm=(*floor, rng.uniform(-0.15, 0.35)),
        organs=_draw_abdomen(rng, heart, tissues, floor, difficulty),
        vessels=_draw_vessels(rng, heart, tissues, centre, height),
        lungs=_draw_lungs(rng, heart, tissues, difficulty),
        arm=_draw_arm(rng, tissues, centre, width) if rng.random() < 0.35 else None,
    )


def _draw_abdomen(
    rng: np.random.Generator, heart: Heart, tissues: Tissues, floor: tuple[float, float], difficulty: Difficulty
) -> tuple[Ellipsoid, ...]:
    """Bowel, liver, spleen, kidney and stomach; stomach and bowel are rings that resemble the heart."""
    z = heart.length
    organs: list[Ellipsoid] = []

    def organ(centre: tuple[float, ...], axes: tuple[float, ...], *layers: tuple[float, float]) -> None:
        jitter = rng.normal(0, 7, 3)
        organs.append(
            Ellipsoid(
                _floats(np.add(centre, jitter)),
                _floats(np.multiply(axes, rng.uniform(0.8, 1.2, 3))),
                rng.uniform(-0.5, 0.5),
                layers,
            )
        )

    for _ in range(round(difficulty.clutter * rng.integers(25, 55))):  # fat, muscle and vessels in between
        place = (rng.uniform(-130, 130), floor[1] + rng.uniform(0, 150), rng.uniform(-40, z))
        axes = (rng.uniform(3, 14), rng.uniform(2, 6), rng.uniform(8, 30))
        organ(place, axes, (0, tissues["wall"] * 0.5), (1, tissues[rng.choice(("fat", "muscle", "vessel", "spleen"))]))
    for _ in range(round(difficulty.clutter * rng.integers(8, 20))):  # bowel loops
        size = rng.uniform(9, 24)
        lumen = tissues[rng.choice(("lung", "omentum", "fluid", "spleen"), p=(0.2, 0.3, 0.2, 0.3))]
        place = (rng.uniform(-110, 110), rng.uniform(floor[1], floor[1] + 130), rng.uniform(-40, 0.6 * z))
        organ(place, (size * rng.uniform(0.8, 1.8), size, size * 1.5), (0, tissues["wall"]), (rng.uniform(2, 4), lumen))
    organ((-70, floor[0] + 25, 0.45 * z), (95, 55, 85), (-1, tissues["wall"] * 0.4), (0.5, tissues["liver"]))
    organ((75, floor[0] + 40, 0.5 * z), (28, 42, 60), (-1, tissues["wall"] * 0.4), (0.5, tissues["spleen"]))
    organ(
        (30, floor[0] + 75, 0.2 * z), (26, 36, 45), (0, tissues["omentum"]), (9, tissues["liver"]), (17, tissues["fat"])
    )
    for _ in range(round(difficulty.clutter * rng.integers(4, 10))):  # vessels of the liver
        place = (rng.uniform(-130, -20), floor[0] + rng.uniform(-10, 60), rng.uniform(0, z))
        organ(place, (rng.uniform(2, 9), rng.uniform(2, 4), 15), (0, tissues["vessel"] * rng.uniform(0.5, 1)))
    content = tissues[rng.choice(("fluid", "blood", "omentum", "spleen", "lung"))]
    size = rng.uniform(18, 32)
    if rng.random() < difficulty.clutter:  # the stomach: a bright lumen in a dark wall, next to the apex
        organ(
            (rng.uniform(15, 60), floor[1] + size + rng.uniform(12, 30), 0.2 * z),
            (size * 1.3, size, 60),
            (0, tissues["wall"]),
            (rng.uniform(3, 6), content),
            (size * 0.5, content * rng.uniform(0.5, 1.1)),
        )
    return tuple(organs)


def _draw_vessels(
    rng: np.random.Generator, heart: Heart, tissues: Tissues, centre: tuple[float, float], height: float
) -> tuple[Ellipsoid, ...]:
    """Spine with its canal, descending aorta, caval vein, oesophagus."""
    z, blood = heart.length, tissues["vessel"]
    spine_x, spine_y = rng.uniform(-45, 5), centre[1] + height - rng.uniform(12, 34)
    aorta = rng.uniform(9, 14)
    vein = rng.uniform(9, 14)
    near = heart.cavity + heart.wall
    return (
        Ellipsoid((spine_x, spine_y, 0.5 * z), (23, 19, 400), 0, ((0, tissues["wall"] * 0.5), (2, tissues["marrow"]))),
        Ellipsoid(
            (spine_x - 3, spine_y + 27, 0.5 * z), (9, 7, 400), 0, ((0, tissues["fluid"]), (4, tissues["muscle"]))
        ),
        Ellipsoid(
            (spine_x + rng.uniform(18, 40), min(spine_y - 12, near + rng.uniform(22, 45)), 0.6 * z),
            (aorta, aorta, 400),
            0,
            ((-2, tissues["wall"]), (0, blood)),
        ),
        Ellipsoid(
            (spine_x - rng.uniform(-5, 22), near + rng.uniform(18, 32), 0.6 * z),
            (vein * 1.3, vein, 300),
            rng.uniform(-0.5, 0.5),
            ((0, blood * rng.uniform(0.6, 1)),),
        ),
        Ellipsoid(
            (spine_x + rng.uniform(0, 20), near + rng.uniform(14, 22), 0.9 * z),
            (8, 6, 300),
            0,
            ((0, tissues["muscle"]), (3, tissues["muscle"] * 0.5)),
        ),
    )


def _draw_lungs(
    rng: np.random.Generator, heart: Heart, tissues: Tissues, difficulty: Difficulty
) -> tuple[Ellipsoid, ...]:
    """Vessels of the lungs: bright dots and branches, larger near the heart."""
    vessels = []
    for _ in range(round(difficulty.clutter * rng.integers(50, 110))):
        x, y, z = _floats(rng.normal((20, -10, 0.6 * heart.length), (60, 38, 35)))
        size = (1.0 + rng.gamma(2, 0.7)) * (1.5 if np.hypot(x, y) < 70 else 1)
        axes = (size * rng.uniform(1, 2.5), size, rng.uniform(4, 14))
        signal = tissues["vessel"] * rng.uniform(0.35, 1)
        vessels.append(Ellipsoid((x, y, z), axes, rng.uniform(-1.6, 1.6), ((0, signal),)))
    return tuple(vessels)


def _draw_arm(rng: np.random.Generator, tissues: Tissues, centre: tuple[float, float], width: float) -> Ellipsoid:
    side, size = float(rng.choice([-1, 1], p=[0.25, 0.75])), rng.uniform(26, 40)
    place = (centre[0] + side * (width + rng.uniform(20, 45)), centre[1] - rng.uniform(50, 110), rng.uniform(-60, 0))
    layers = (
        (0, tissues["fat"]),
        (rng.uniform(4, 10), tissues["muscle"]),
        (size - 9, tissues["wall"] * 0.3),
        (size - 6, tissues["marrow"]),
    )
    return Ellipsoid(place, (size, size * rng.uniform(1, 1.6), 120), rng.uniform(-0.6, 0.6), layers)


@dataclass(frozen=True)
class Stack:
    """How the slices lie and how the scanner saw them."""

    shape: tuple[int, int, int]  # slices, rows, columns
    spacing: tuple[float, float, float]  # mm: between slices, rows, columns
    start: float  # height of slice 0 in the heart's frame, mm (negative: below the apex)
    turn: float  # heart in the picture, radian
    roll: float  # body in the picture, radian
    offset: tuple[float, ...]  # heart in the picture, mm from the centre
    drift: tuple[float, ...]  # heart's axis against the slice normal: mm sideways per mm along
    shifts: Array  # (slices, 2) breath-hold shift of each slice, mm


def draw_stack(rng: np.random.Generator, heart: Heart, difficulty: Difficulty) -> Stack:
    """6-12 slices 5-10 mm apart that span the heart from about its apex to about its valves; 1.2-1.8 mm pixels."""
    pose = difficulty.pose
    covered = heart.length + rng.uniform(-18, 14)  # some stacks miss an end of the heart, some reach beyond it
    fewest = min(12, max(6, math.ceil(covered / 10)))
    slices = min(12, fewest + int(rng.integers(0, 4)))
    step = round(float(np.clip(covered / slices, 5, 10)), 2)
    pixel = round(float(rng.uniform(1.2, 1.8)), 3)
    view = rng.uniform(260, 340)
    sides = _floats(rng.permuted((view, view * rng.uniform(0.8, 1))))  # the field of view is rarely square
    rows, columns = (int(np.clip(round(side / pixel), 160, 256)) for side in sides)
    return Stack(
        shape=(slices, rows, columns),
        spacing=(step, pixel, pixel),
        start=-rng.uniform(0.1, 0.5) * (slices * step - heart.length) + step / 2,
        turn=0.45 + float(np.clip(pose * rng.normal(0, 0.3), -0.55 * pose, 0.55 * pose)),
        roll=float(np.clip(pose * rng.normal(0, 0.25), -0.5 * pose, 0.5 * pose)),
        offset=_floats(pose * rng.uniform(-22, 22, 2)),
        drift=_floats(pose * rng.normal(0, 0.08, 2)),
        shifts=(pose * rng.normal(0, 1.3, (slices, 2))).astype(np.float32),
    )


# ------------------------------------------------------------------------------------------------------- drawing
def _bump(angle: Array, middle: float, width: float) -> Array:
    """1 at `middle`, 0 beyond `width` either side, smooth, periodic."""
    away = np.abs(np.angle(np.exp(1j * (angle - middle)))).astype(np.float32)
    return np.cos(np.clip(away / width, 0, 1) * (np.pi / 2)) ** 2


def _step(value: Array | float, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


ANGLES = np.linspace(-np.pi, np.pi, 720, endpoint=False, dtype=np.float32)


def left_ventricle(heart: Heart, angle: Array, z: float, contraction: Array) -> tuple[Array, Array]:
    """Outer and inner radius in mm of the LV wall towards each `angle` at height z; inner <= 0 where no cavity is.

    `contraction` (F, 1) broadcasts against `angle` (A,). The apex stays, the base comes down; a slice therefore sees
    other myocardium at end systole than at end diastole.
    """
    shortened = 1 - heart.longitudinal * contraction
    t = np.clip(z / (heart.length * shortened), 0, 1.1)  # share of the length of what this slice sees
    profile = np.sqrt(np.clip(1 - ((t - heart.equator) / heart.equator) ** 2, 0, 1))
    c2, s2, c3, s3 = heart.outline
    outline = 1 + c2 * np.cos(2 * angle) + s2 * np.sin(2 * angle) + c3 * np.cos(3 * angle) + s3 * np.sin(3 * angle)
    septal = _bump(angle, np.pi, 1.5)
    outer = (heart.cavity + heart.wall) * profile * (outline - heart.flattening * septal * _step(t, 0.2, 0.6))

    low, high = heart.scar_reach
    scar = _step(t, low - 0.1, low) * (1 - _step(t, high, high + 0.1))
    scar = scar * _bump(angle, heart.scar_angle, heart.scar_width) ** 0.5
    wall = (heart.wall + heart.septum * septal * _step(t, 0.15, 0.5)) * (0.62 + 0.38 * _step(t, 0.0, 0.4))
    wall = wall * (1 - heart.scar * scar)
    inner = outer - wall

    moving = 1 - scar * min(1.0, 1.6 * heart.scar)  # a scar hardly contracts
    fraction = np.clip(heart.shortening * contraction * moving * (1.25 - 0.3 * t), 0, 0.92)
    squeezed = np.maximum(inner, 0) * (1 - fraction)
    thickened = np.sqrt(squeezed**2 + np.maximum(outer**2 - np.maximum(inner, 0) ** 2, 0) / shortened)
    return np.where(outer > 0, thickened, -1), np.where(inner > 0, squeezed, inner)


def right_ventricle(heart: Heart, x: Array, y: Array, z: float, contraction: Array) -> Array:
    """Distance in mm to the RV's free wall: an ellipse behind the LV, whose outer wall cuts it to a crescent."""
    shortened = 1 - 1.3 * heart.longitudinal * contraction
    t = z / (heart.length * shortened)
    u = np.clip((t - heart.rv_apex) / (1 - heart.rv_apex), 0, 1)
    bulge = heart.bulge * np.sqrt(u * (2 - u)) * (1 - heart.rv_shortening * contraction * (1.2 - 0.3 * u))
    profile = np.sqrt(np.clip(1 - ((t - heart.equator) / heart.equator) ** 2, 0, 1))
    radius = np.maximum((heart.cavity + heart.wall) * np.where(t > 1, 1, profile), 1)
    radius = radius * (1 - 0.33 * heart.shortening * contraction)  # the RV follows the wall of the LV inwards
    reach = (0.75 * radius + bulge) / 2  # half the ellipse along the septal direction
    middle = -(radius + bulge) + reach
    height = np.maximum(heart.rv_height * radius * (0.55 + 0.45 * u) + 0.12 * bulge, 1)
    front = -heart.rv_outflow * u**2
    distance = ellipse_distance(x - middle, y - front - 0.25 * (x - middle) * u, reach, height)
    return np.where(t > heart.rv_apex, distance, 99)


def paint_heart(
    signal: Array,
    labels: Array,
    heart: Heart,
    tissues: Tissues,
    grid: tuple[Array, Array, float],
    z: float,
    thickness: float,
    contraction: Array,
    noise: Sequence[Array],
) -> None:
    """Paint one plane of the heart over `signal` (F, H, W) and add its classes to `labels` (4, F, H, W), in place.

    `grid` is x (H, W) and y (H, W) in the heart's frame and the pixel, in mm. The plane stands for `thickness` mm.
    `noise` are three fields (H, W) of unit variance, fine to coarse: trabeculae, blood mottled by its flow, uneven fat.
    """
    x, y, pixel = grid
    mesh, flow, swell = noise
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    outer, inner = left_ventricle(heart, ANGLES, z, contraction[..., 0])
    depth = inner.mean(-1)[:, None, None]  # mean radius of the cavity
    nearest = (angle * (len(ANGLES) / (2 * np.pi))).astype(np.intp)
    nearest += len(ANGLES) // 2
    nearest[nearest == len(ANGLES)] = 0
    outer, inner = outer[:, nearest], inner[:, nearest]
    epicardium, endocardium = radius - outer, radius - inner
    free_wall = right_ventricle(heart, x, y, z, contraction)
    tilt = heart.valve_tilt[0] * x + heart.valve_tilt[1] * y
    mitral = heart.length * (1 - heart.longitudinal * contraction) + tilt
    tricuspid = mitral + heart.rv_top - 0.3 * heart.longitudinal * heart.length * contraction
    below = np.clip(0.5 - (z - mitral) / thickness, 0, 1)
    below_right = np.clip(0.5 - (z - tricuspid) / thickness, 0, 1)

    whole = np.minimum(epicardium, free_wall)
    lobes = heart.fat * (0.2 + 1.1 * np.cos(angle + 2.2) + 0.6 * swell)  # thickest in front of the RV
    sac = whole - 3 - np.clip(lobes, -3, 18)
    paint(signal, coverage(sac, pixel), tissues["fat"] * (0.9 + 0.1 * flow))
    paint(signal, 0.7 * rim(sac, pixel), tissues["air"])  # pericardium
    if z > 0.75 * heart.length:
        _paint_atria(signal, heart, tissues, grid, z, flow)

    paint(signal, coverage(free_wall - 3, pixel) * below_right, tissues["myocardium"])
    blood = tissues["rv_blood"] * (1 + 0.07 * flow)
    meshwork = heart.trabeculae * np.clip(mesh - 0.4, 0, 1) * _step(-free_wall, 14, 0)  # near the free wall
    right = coverage(free_wall, pixel) * below_right
    paint(signal, right, blood + meshwork * (tissues["myocardium"] - blood))

    paint(signal, coverage(epicardium, pixel) * below, tissues["myocardium"] * (1 + 0.05 * mesh))
    left = coverage(endocardium, pixel) * below
    blood = tissues["blood"] * (1 + 0.07 * flow)
    meshwork = heart.trabeculae * np.clip(mesh - 0.2, 0, 1) * _step(-endocardium, 5, 0)
    paint(signal, left, blood + meshwork * (tissues["myocardium"] - blood))
    t = z / heart.length
    for where, size, place in heart.papillary:
        size = size * float(_step(t, 0.1, 0.3) * (1 - _step(t, 0.6, 0.75)))
        if size > 0.5:
            away = place * np.maximum(depth, 0)
            muscle = np.hypot(x - away * np.cos(where), y - away * np.sin(where)) - size
            paint(signal, coverage(muscle, pixel) * left, tissues["myocardium"])

    myocardium = coverage(epicardium, pixel) * below
    labels[1] += right * (1 - coverage(epicardium, pixel))
    labels[2] += myocardium - np.minimum(left, myocardium)
    labels[3] += np.minimum(left, myocardium)


def _paint_atria(
    signal: Array, heart: Heart, tissues: Tissues, grid: tuple[Array, Array, float], z: float, flow: Array
) -> None:
    """What lies above the valves: both atria, the root of the aorta, the pulmonary trunk. Blood, but background."""
    x, y, pixel = grid
    above = max(0.0, (z - 0.8 * heart.length) / heart.length)
    blood, wall = tissues["blood"] * (0.95 + 0.06 * flow), tissues["myocardium"]
    size = heart.atrium
    for cx, cy, a, b in (
        (0.1 * size, 0.35 * size, 1.15 * size, 0.9 * size),  # left atrium
        (-1.9 * size, 0.45 * size, 0.9 * size, 1.15 * size),  # right atrium
        (-1.25 * size, -1.25 * size - 20 * above, 0.75 * size, 0.62 * size),  # pulmonary trunk
        (-0.75 * size, -0.35 * size, 0.62 * size, 0.62 * size),  # root of the aorta
    ):
        distance = ellipse_distance(x - cx, y - cy, a, b)
        paint(signal, 0.7 * coverage(distance - 1.8, pixel), wall)
        paint(signal, coverage(distance, pixel), blood)


def draw_body_plane(
    body: Body, heart: Heart, tissues: Tissues, grid: Grid, pose: Pose, z: float, rough: Array, swell: Array
) -> Array:
    """Signal (H, W) of everything but the heart at height z; `pose` is the body's.

    `rough` and `swell` (H, W) are noise of unit variance, fine (texture, ragged edges) and coarse (uneven surfaces).
    """
    (x, y), pixel = pose.inside(grid), grid.pixel
    t = float(np.clip(z / heart.length, -0.2, 1.2))
    scale = 1 - body.taper * (1 - t)
    a, b = body.inside[0] * scale, body.inside[1] * scale
    cx, cy = body.centre[0], body.centre[1] + 0.35 * (body.inside[1] - b)
    angle = np.arctan2(y - cy, x - cx)
    c2, s2, c3, s3 = body.outline
    waves = c2 * np.cos(2 * angle) + s2 * np.sin(2 * angle) + c3 * np.cos(3 * angle) + s3 * np.sin(3 * angle)
    inside = ellipse_distance(x - cx, y - cy, a, b) + waves + 1.5 * swell
    c1, s1, c2, s2 = body.fat_lobes
    lobes = 1 + c1 * np.cos(angle) + s1 * np.sin(angle) + c2 * np.cos(2 * angle) + s2 * np.sin(2 * angle)
    fat = body.fat * np.clip(lobes, 0.15, 2.5)

    signal = np.full(inside.shape, tissues["air"], np.float32)
    skin, muscle = inside - body.muscle - fat, inside - body.muscle
    paint(signal, coverage(skin - 1.5, pixel), tissues["muscle"])
    paint(signal, coverage(skin, pixel), tissues["fat"] * (1 + 0.08 * rough))
    paint(signal, coverage(muscle, pixel), tissues["muscle"] * (1 + 0.25 * rough))
    paint(signal, 0.6 * np.maximum(rim(skin, pixel), rim(muscle, pixel)), tissues["air"])  # fat and water cancel
    for where, size in body.ribs:
        radius = 1 + 0.5 * body.muscle / min(a, b)
        spot = (cx + radius * a * np.cos(where), cy + radius * b * np.sin(where), z)
        layers = ((-1.0, tissues["wall"] * 0.4), (1.0, tissues["marrow"]))
        Ellipsoid(spot, (size * 1.8, size, 1), where + np.pi / 2, layers).paint(signal, grid, pose, z)
    chest = coverage(inside, pixel)
    paint(signal, chest, tissues["lung"] * (1 + 0.3 * np.abs(rough)))
    for vessel in body.lungs:
        vessel.paint(signal, grid, pose, z, chest)
    back = coverage(inside - 12 + 0.25 * (cy + 0.62 * b - y), pixel) * coverage(cy + 0.45 * b - y + 6 * rough, 12)
    paint(signal, back * chest, tissues["muscle"] * (1 + 0.35 * rough))

    deep, shallow, slope = body.diaphragm
    floor = shallow + (deep - shallow) * np.clip(t, 0, 1.2)
    abdomen = coverage(floor + slope * x * 0.5 + 0.0022 * x**2 + 4 * swell + rough - y, pixel) * chest
    paint(signal, abdomen, tissues["omentum"] * np.clip(1 + 0.3 * rough + 0.25 * swell, 0.2, 2))
    for organ in body.organs:
        organ.paint(signal, grid, pose, z, abdomen)
    for vessel in body.vessels:
        vessel.paint(signal, grid, pose, z)
    if body.arm is not None:
        body.arm.paint(signal, grid, pose, z)
    return signal


def _planes(count: int, thickness: float) -> tuple[float, ...]:
    """Offsets in mm of `count` planes that share a slice of `thickness` mm evenly."""
    return tuple(thickness * ((index + 0.5) / count - 0.5) for index in range(count))


def contraction_curve(frames: int, systole: int) -> Array:
    """Contraction in each frame of a beat: 0 in frame 0 (end diastole), 1 in frame `systole`, relaxing more slowly."""
    index = np.arange(frames, dtype=np.float32)
    rising = np.sin(0.5 * np.pi * index / systole) ** 2
    falling = np.cos(0.5 * np.pi * (index - systole) / (frames - systole)) ** 2
    return np.where(index <= systole, rising, 0.92 * falling + 0.08 * (index == systole)).astype(np.float32)


@dataclass(frozen=True)
class Patient:
    """A drawn patient: `images` (F, Z, H, W) int16, `labels` (F, Z, H, W) uint8, slice 0 the apical end."""

    group: str
    images: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]  # z, y, x in mm
    end_systole: int  # index of that frame; end diastole is frame 0
    height: float  # of the patient, cm
    weight: float  # kg


def draw_patient(rng: np.random.Generator, group: str, frames: int, difficulty: Difficulty = DIFFICULTY) -> Patient:
    """A patient of `group` (one of `GROUPS`) with `frames` >= 2 frames of one beat."""
    heart = draw_heart(rng, group, difficulty)
    tissues = draw_tissues(rng, difficulty)
    body = draw_body(rng, heart, tissues, difficulty)
    stack = draw_stack(rng, heart, difficulty)
    systole = max(1, round(0.38 * frames))
    contraction = contraction_curve(frames, systole)
    signal, labels = draw_signal(rng, heart, body, tissues, stack, contraction)

    depth, rows, columns = stack.shape
    pixel = stack.spacing[1]
    ripple = difficulty.bias * rng.uniform(0.04, 0.16) * smooth_noise(rng, (rows, columns), 60 / pixel)
    reach = rng.uniform(110, 320) / max(difficulty.bias, 1e-3)
    field = coil_field(Grid.centred(rows, columns, pixel), reach, rng.uniform(-2.2, -0.5), ripple)
    radius = rng.uniform(145, 260) / max(difficulty.bias, 1e-3)
    field *= banding(Grid.centred(rows, columns, pixel), radius, 1.2 * smooth_noise(rng, (rows, columns), 50 / pixel))
    images = scan(
        signal,
        rng,
        field=field,
        sigma=difficulty.noise * rng.uniform(0.5, 1.6),
        gain=rng.uniform(180, 700),
        blur=rng.uniform(0.4, 0.75),
    )
    height = rng.normal(170, 9)
    weight = rng.normal(25.5, 4) * (height / 100) ** 2
    return Patient(group, images, labels, stack.spacing, systole, round(height, 1), round(weight, 1))


def draw_signal(
    rng: np.random.Generator, heart: Heart, body: Body, tissues: Tissues, stack: Stack, contraction: Array
) -> tuple[Array, np.ndarray]:
    """Signal (F, Z, H, W), blood 1, and labels of the same shape, before the scanner: partial volume, no noise."""
    (depth, rows, columns), (step, pixel, _) = stack.shape, stack.spacing
    frames = len(contraction)
    grid = Grid.centred(rows, columns, pixel)
    signal = np.empty((frames, depth, rows, columns), np.float32)
    labels = np.zeros((frames, depth, rows, columns), np.uint8)
    rough = smooth_noise(rng, (rows, columns), 9 / pixel)
    grain = smooth_noise(rng, (rows, columns), 3 / pixel)
    swell = smooth_noise(rng, (rows, columns), 26 / pixel)
    extent = heart.cavity + heart.wall + heart.bulge / 2 + 32
    beat = contraction[:, None, None]
    for index in range(depth):
        z = stack.start + index * step
        x, y = _floats(stack.shifts[index] + np.multiply(stack.drift, z - heart.length / 2) + stack.offset)
        body_pose, heart_pose = Pose(x, y, stack.roll), Pose(x, y, stack.roll + stack.turn)
        lumps = np.roll(rough, rng.integers(0, 12, 2), (0, 1))
        background = np.zeros((rows, columns), np.float32)
        for offset in _planes(BODY_SUBSLICES, step):
            background += draw_body_plane(body, heart, tissues, grid, body_pose, z + offset, lumps, swell)
        background *= 1 / BODY_SUBSLICES + 0.07 / BODY_SUBSLICES * np.roll(grain, rng.integers(0, rows, 2), (0, 1))

        window = grid.window(*heart_pose.outside(-heart.bulge / 2, 0), extent)
        noise = [np.roll(field, rng.integers(0, rows, 2), (0, 1))[window] for field in (grain, rough, swell)]
        local = (*heart_pose.inside(grid.crop(window)), pixel)
        drawn = np.zeros((frames, *background[window].shape), np.float32)
        classes = np.zeros((4, *drawn.shape), np.float32)
        for offset in _planes(HEART_SUBSLICES, step):
            part = np.repeat(background[None][(..., *window)], frames, 0)
            paint_heart(part, classes, heart, tissues, local, z + offset, step / HEART_SUBSLICES, beat, noise)
            drawn += part / HEART_SUBSLICES
        classes[0] = HEART_SUBSLICES - classes[1:].sum(0)
        signal[:, index] = background
        signal[(slice(None), index, *window)] = drawn
        winner = classes.argmax(0).astype(np.uint8)
        slivers = (winner == 1).sum((1, 2)) * pixel**2 < SLIVER
        winner[slivers] = np.where(winner[slivers] == 1, 0, winner[slivers])
        labels[(slice(None), index, *window)] = winner
    return signal, labels
