"""Phantom hearts: deterministic, laid out like ACDC, and anatomically what their group says."""

import json
import time
from collections import defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation, binary_fill_holes

from medlib.data.phantoms import PHANTOMS, STAMP, Difficulty, Release, write_phantoms
from medlib.data.phantoms.acdc import flip_slices, patient_group, save_patient, stack_affine
from medlib.data.phantoms.shapes import Grid, coverage, ellipse_distance
from medlib.data.phantoms.short_axis import GROUPS, contraction_curve, draw_heart, draw_patient, left_ventricle
from medlib.rng import numpy_generator

RV, MYO, LV = 1, 2, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms("acdc", tmp_path_factory.mktemp("phantoms") / "acdc", patients=5, seed=3, cine_frames=1)


@pytest.fixture(scope="module")
def drawn():
    """Two patients of each group, end diastole and end systole."""
    return [
        draw_patient(numpy_generator(0, "test", group, number), group, frames=2)
        for group in GROUPS
        for number in range(2)
    ]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def info(folder: Path) -> dict[str, str]:
    return dict(line.split(": ") for line in (folder / "Info.cfg").read_text().splitlines())


def folders(root: Path) -> list[Path]:
    return sorted((root / "training").iterdir())


# ------------------------------------------------------------------------------------------------------- files
def test_layout_is_that_of_the_release(root):
    assert [folder.name for folder in folders(root)] == [f"patient{k:03d}" for k in range(1, 6)]
    for folder in folders(root):
        about = info(folder)
        assert list(about) == ["ED", "ES", "Group", "Height", "NbFrame", "Weight"]
        ed, es, frames = (int(about[key]) for key in ("ED", "ES", "NbFrame"))
        assert ed == 1 < es <= frames == 3
        names = {f"{folder.name}_{part}.nii.gz" for part in ("4d", f"frame{ed:02d}", f"frame{ed:02d}_gt")}
        names |= {f"{folder.name}_{part}.nii.gz" for part in (f"frame{es:02d}", f"frame{es:02d}_gt")}
        assert {path.name for path in folder.iterdir()} == names | {"Info.cfg"}

        cine = nib.load(folder / f"{folder.name}_4d.nii.gz")
        assert cine.shape[3] == frames and cine.header.get_xyzt_units() == ("mm", "sec")
        for frame in (ed, es):
            image = nib.load(folder / f"{folder.name}_frame{frame:02d}.nii.gz")
            label = nib.load(folder / f"{folder.name}_frame{frame:02d}_gt.nii.gz")
            assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
            assert image.shape == label.shape == cine.shape[:3]
            np.testing.assert_array_equal(image.affine, label.affine)
            np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(cine.dataobj)[..., frame - 1])
            assert set(np.unique(label.dataobj)) == {0, RV, MYO, LV}


def test_sizes_and_spacings_are_those_of_the_clinic(root):
    for folder in folders(root):
        image = nib.load(folder / f"{folder.name}_frame01.nii.gz")
        x, y, z = image.header.get_zooms()
        width, height, depth = image.shape
        assert x == y and 1.2 <= x <= 1.8 and 5 <= z <= 10
        assert 160 <= width <= 256 and 160 <= height <= 256 and 6 <= depth <= 12
        values = np.asarray(image.dataobj)
        assert values.min() >= 0 and 100 < np.percentile(values, 99) < 4095


def test_each_block_of_five_patients_holds_every_group():
    groups = [patient_group(0, number) for number in range(1, 21)]
    assert all(sorted(groups[k : k + 5]) == sorted(GROUPS) for k in range(0, 20, 5))
    assert groups[:5] != groups[5:10] or groups[5:10] != groups[10:15]


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_patients_and_workers(root, tmp_path):
    fewer = write_phantoms("acdc", tmp_path / "fewer", patients=2, seed=3, cine_frames=1, workers=1)
    all_files, some_files = contents(root), contents(fewer)
    del some_files[STAMP]
    assert len(some_files) == 12
    assert all(all_files[name] == content for name, content in some_files.items())


def test_another_seed_gives_other_hearts(root, tmp_path):
    other = write_phantoms("acdc", tmp_path / "other", patients=1, seed=4, cine_frames=1)
    name = "training/patient001/patient001_frame01.nii.gz"
    assert (root / name).read_bytes() != (other / name).read_bytes()


# ------------------------------------------------------------------------------------------------------- stamp
def test_what_stands_there_is_not_drawn_again(tmp_path, monkeypatch):
    calls = []

    def draw(root, number, seed, **_):
        calls.append(number)
        (root / f"{number}").mkdir(parents=True)
        (root / f"{number}" / "image").write_text(str(number))

    monkeypatch.setitem(PHANTOMS, "acdc", Release(draw, options=("cine_frames", "difficulty")))

    def write(patients=2, seed=0, **options):
        calls.clear()
        assert write_phantoms("acdc", tmp_path / "root", patients, seed, **options) == tmp_path / "root"
        return sorted(calls)

    assert write() == [1, 2]
    assert write() == []
    assert write(seed=1) == [1, 2]
    assert write(seed=1, cine_frames=0) == [1, 2]
    assert write(seed=1, cine_frames=0, difficulty=Difficulty(noise=0.1)) == [1, 2]
    assert write(patients=1) == [1]
    assert not (tmp_path / "root" / "2").exists()
    (tmp_path / "root" / "1" / "image").unlink()
    assert write(patients=1) == [1]
    (tmp_path / "root" / STAMP).write_text("{ half a st")
    assert write(patients=1) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]  # nothing left beside it


def test_an_interrupted_drawing_leaves_nothing_behind_and_the_old_phantoms_in_place(tmp_path, monkeypatch):
    def draw(root, number, seed, size):
        if seed and number == 2:
            raise KeyboardInterrupt
        (root / f"{number}-{seed}").mkdir(parents=True)

    monkeypatch.setitem(PHANTOMS, "acdc", Release(draw))
    root = write_phantoms("acdc", tmp_path / "root", 2, seed=0)
    with pytest.raises(KeyboardInterrupt):
        write_phantoms("acdc", root, 2, seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]
    assert json.loads((root / STAMP).read_text())["seed"] == 0


def test_an_interrupted_drawing_draws_no_more_patients(tmp_path, monkeypatch):
    drawn = []

    def draw(root, number, seed, size):
        drawn.append(number)
        time.sleep(0.02)
        if number == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(PHANTOMS, "acdc", Release(draw))
    with pytest.raises(KeyboardInterrupt):
        write_phantoms("acdc", tmp_path / "root", 200, seed=0, workers=2)
    assert len(drawn) < 100 and not list(tmp_path.iterdir())


def test_a_folder_with_other_content_is_never_touched(tmp_path):
    (tmp_path / "patient001.nii.gz").write_text("a real scan")
    with pytest.raises(FileExistsError, match="holds no phantoms.json"):
        write_phantoms("acdc", tmp_path, 1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["patient001.nii.gz"]
    with pytest.raises(FileExistsError):
        write_phantoms("acdc", tmp_path / "patient001.nii.gz", 1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "acdcc"}, "'acdcc'; there are phantoms for: acdc, amos22, btcv, chd, flare22, lits, mmwhs, msd"),
        ({"name": "amos22", "patients": 599}, "between 1 and 598 for 'amos22', got 599"),
        ({"size": "huge"}, "one of small, full, got 'huge'"),
        ({"patients": 0}, "between 1 and 999 for 'acdc', got 0"),
        ({"patients": 1000}, "between 1 and 999 for 'acdc', got 1000"),
        ({"cine_frames": -1}, "0 or more, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_phantoms(**{"name": "acdc", "root": tmp_path / "root", "patients": 1, "seed": 0, **change})
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- orientation
def test_flipped_slices_are_the_same_anatomy_at_the_same_place():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 9, (4, 5, 6))
    affine = stack_affine(rng, shape=(6, 5, 4), spacing=(8.0, 1.5, 1.5))
    flipped, other = flip_slices(array, affine)
    for voxel in np.ndindex(array.shape):
        twin = (voxel[0], voxel[1], 5 - voxel[2])
        assert array[voxel] == flipped[twin]
        np.testing.assert_allclose(affine @ (*voxel, 1), other @ (*twin, 1), atol=1e-9)


def test_affine_has_the_spacing_a_right_handed_frame_and_z_along_superior():
    for seed in range(20):
        affine = stack_affine(np.random.default_rng(seed), shape=(9, 200, 180), spacing=(8.0, 1.4, 1.4))
        np.testing.assert_allclose(nib.affines.voxel_sizes(affine), (1.4, 1.4, 8.0))
        assert np.linalg.det(affine[:3, :3]) > 0
        assert nib.aff2axcodes(affine) == ("L", "P", "S")
        assert affine[2, 2] / 8 > np.cos(np.radians(21))


def test_both_slice_orders_occur_and_superior_is_the_base_in_every_patient(tmp_path):
    patient = draw_patient(numpy_generator(0, "test", "orientation"), "NOR", frames=2)
    affine = stack_affine(np.random.default_rng(0), patient.labels.shape[1:], patient.spacing)
    volumes = {}
    for flipped in (False, True):
        save_patient(tmp_path / f"patient00{flipped:d}", patient, affine, flipped=flipped)
        volumes[flipped] = nib.load(tmp_path / f"patient00{flipped:d}" / f"patient00{flipped:d}_frame01_gt.nii.gz")
    assert volumes[False].affine[2, 2] > 0 > volumes[True].affine[2, 2]
    straight, turned = (nib.as_closest_canonical(volumes[flipped]) for flipped in (False, True))
    np.testing.assert_array_equal(straight.dataobj, turned.dataobj)
    np.testing.assert_allclose(straight.affine, turned.affine, atol=1e-4)
    rv = (np.asarray(straight.dataobj) == RV).sum((0, 1))
    assert rv[0] == 0 < rv[len(rv) // 2]  # canonical slice 0 is the apex, where no RV is


def test_about_a_third_of_the_patients_is_flipped(root):
    from medlib.data.phantoms.acdc import FLIPPED

    draws = [numpy_generator(0, "phantom", "acdc", number, "orientation") for number in range(1, 201)]
    share = np.mean([(rng.uniform(size=3), rng.normal(size=3), rng.random())[2] < FLIPPED for rng in draws])
    assert 0.25 < share < 0.45
    signs = {nib.load(folder / f"{folder.name}_4d.nii.gz").affine[2, 2] > 0 for folder in folders(root)}
    assert signs == {True, False}


# --------------------------------------------------------------------------------------------------- anatomy
def volumes(patient, frame):
    """mL of RV, MYO, LV."""
    voxel = np.prod(patient.spacing) / 1000
    return np.array([(patient.labels[frame] == c).sum() * voxel for c in (RV, MYO, LV)])


def test_hearts_beat(drawn):
    for patient in drawn:
        diastole, systole = volumes(patient, 0), volumes(patient, patient.end_systole)
        assert systole[2] < 0.95 * diastole[2] and systole[0] < diastole[0]
        assert (
            diastole[1] / 1.35 < systole[1] < diastole[1] * 1.35
        )  # the muscle keeps its volume, as far as slices tell
        assert 30 < diastole[2] < 450 and 50 < diastole[1] < 300 and 20 < diastole[0] < 300


def test_the_muscle_encloses_the_cavity_where_the_slice_lies_well_below_the_valves(drawn):
    for patient in drawn:
        depth = patient.labels.shape[1]
        for label in patient.labels[0, depth // 4 : depth // 2]:
            ring, cavity = label == MYO, label == LV
            assert cavity.any() and ring.any()
            np.testing.assert_array_equal(binary_fill_holes(ring) & ~ring, cavity)
            assert not (binary_dilation(cavity) & (label == RV)).any()


def test_apex_has_no_right_ventricle_and_every_class_grows_from_it(drawn):
    for patient in drawn:
        area = np.array([[(label == c).sum() for c in (RV, MYO, LV)] for label in patient.labels[0]])
        first = [np.flatnonzero(area[:, c])[0] for c in range(3)]
        assert first[0] >= max(first[1], first[2])  # the RV begins last
        assert area[0, 0] == 0
        assert area[len(area) // 2, 2] > 2 * area[0, 2]


def test_groups_differ_as_the_diseases_do(drawn):
    cavity, ejection, right, wall = (defaultdict(list) for _ in range(4))
    for patient in drawn:
        diastole, systole = volumes(patient, 0), volumes(patient, patient.end_systole)
        cavity[patient.group].append(diastole[2])
        ejection[patient.group].append(1 - systole[2] / diastole[2])
        right[patient.group].append(diastole[0])
        middle = patient.labels[0, patient.labels.shape[1] // 2]
        outer, inner = (np.sqrt((middle >= c).sum() * patient.spacing[1] ** 2 / np.pi) for c in (MYO, LV))
        wall[patient.group].append(outer - inner)  # mean thickness, mm
    mean = {
        name: {g: np.mean(v) for g, v in table.items()}
        for name, table in {"cavity": cavity, "ejection": ejection, "right": right, "wall": wall}.items()
    }
    assert mean["cavity"]["DCM"] > 1.5 * mean["cavity"]["NOR"]
    assert mean["ejection"]["NOR"] > 0.5 > 0.4 > mean["ejection"]["DCM"]
    assert mean["ejection"]["DCM"] < mean["ejection"]["MINF"] < mean["ejection"]["NOR"]
    assert mean["wall"]["HCM"] > 1.3 * mean["wall"]["NOR"]
    assert mean["right"]["RV"] > 1.3 * mean["right"]["NOR"]


def test_an_infarct_is_a_thin_segment_that_hardly_moves():
    still = np.zeros((1, 1), np.float32)
    around = np.linspace(-np.pi, np.pi, 90, endpoint=False, dtype=np.float32)
    for number in range(10):
        heart = draw_heart(numpy_generator(0, "infarct", number), "MINF", Difficulty(shape=0))
        z = heart.length * np.mean(heart.scar_reach)
        outer, inner = (radius[0] for radius in left_ventricle(heart, around, z, still))
        _, systole = (radius[0] for radius in left_ventricle(heart, around, z, still + 1))
        distance = np.abs(np.angle(np.exp(1j * (around - heart.scar_angle))))
        scar, remote = distance < 0.3 * heart.scar_width, distance > 1.1 * heart.scar_width
        thickness, motion = outer - inner, 1 - systole / inner
        assert thickness[scar].mean() < 0.72 * thickness[remote].mean()
        assert motion[scar].mean() < 0.7 * motion[remote].mean()


def test_the_muscle_is_incompressible():
    heart = draw_heart(numpy_generator(0, "muscle"), "NOR", Difficulty())
    around = np.linspace(-np.pi, np.pi, 360, endpoint=False, dtype=np.float32)
    contraction = np.array([[0.0], [0.5], [1.0]], np.float32)
    shortened = 1 - heart.longitudinal * contraction[:, 0]
    volume = []
    for frame, short in enumerate(shortened):  # follow the same piece of muscle as it moves with the base
        outer, inner = left_ventricle(heart, around, 0.5 * heart.length * short, contraction[frame : frame + 1])
        volume.append(((outer**2 - inner**2).mean() * np.pi * short).item())
    np.testing.assert_allclose(volume, volume[0], rtol=1e-4)


@pytest.mark.parametrize(("frames", "systole"), [(2, 1), (3, 1), (6, 2), (30, 11)])
def test_contraction_rises_to_end_systole_and_falls_back(frames, systole):
    curve = contraction_curve(frames, systole)
    assert curve[0] == 0 and curve[systole] == pytest.approx(1)
    assert curve.argmax() == systole and (np.diff(curve[: systole + 1]) > 0).all()
    assert (np.diff(curve[systole:]) < 0).all() and (curve >= 0).all()


# --------------------------------------------------------------------------------------------------- pictures
def test_signal_is_that_of_cine_mri_and_thresholds_do_not_solve_it(drawn):
    blood_over_muscle, overlap = [], []
    for patient in drawn:
        image, label = patient.images[0].astype(float), patient.labels[0]
        blood, muscle = np.median(image[label == LV]), np.median(image[label == MYO])
        blood_over_muscle.append(blood / muscle)
        low = np.percentile(image[label == LV], 10)
        overlap.append((image[label == 0] > low).sum() / (label == LV).sum())
    assert min(blood_over_muscle) > 1.1 and np.median(blood_over_muscle) > 1.8
    assert np.median(overlap) > 1  # more background than LV is as bright as the LV


def test_difficulty_switches_act(drawn):
    def picture(**change):
        easy = {"noise": 0.0, "bias": 0.0, "contrast": 0.0, "pose": 0.0, "shape": 0.0, "clutter": 0.0}
        return draw_patient(numpy_generator(0, "test", "switch"), "NOR", 2, Difficulty(**{**easy, **change}))

    plain, noisy = picture(), picture(noise=0.05)
    air = (slice(None), slice(0, 8), slice(0, 8))
    assert noisy.images[0][air].std() > 3 * plain.images[0][air].std()
    np.testing.assert_array_equal(noisy.labels, plain.labels)  # noise leaves the anatomy alone


def test_coverage_gives_the_area_of_a_circle():
    grid = Grid.centred(64, 60, 1.5)
    area = coverage(ellipse_distance(grid.x - 3.2, grid.y + 1.7, 20.0, 20.0), grid.pixel).sum() * grid.pixel**2
    assert area == pytest.approx(np.pi * 20**2, rel=2e-3)
