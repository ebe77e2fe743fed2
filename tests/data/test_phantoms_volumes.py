"""Phantoms of the whole-volume releases: layouts, label values, orientation, anatomy, and the tools that draw them."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import label as components
from scipy.ndimage import map_coordinates

from medlib.data import load_volume, read_dataset
from medlib.data.phantoms import STAMP, abdominal, amos22, btcv, chd, flare22, lits, mmwhs, write_phantoms
from medlib.data.phantoms.abdomen import ORGANS, draw_abdomen
from medlib.data.phantoms.acquisition import ct_scan, place
from medlib.data.phantoms.cardiac import cardiac_scan
from medlib.data.phantoms.shapes import coverage
from medlib.data.phantoms.solids import Block, Field, Solid, Stack, Tube, Warp, around, draw_slab, ellipsoid, turn
from medlib.data.phantoms.whole_heart import MALFORMATIONS, PARTS
from medlib.rng import numpy_generator

PATIENTS = {"btcv": 5, "amos22": 7, "flare22": 6, "lits": 4, "mmwhs": 6, "chd": 7, "msd": 6}
HARD = {"gallbladder", "right adrenal", "left adrenal", "duodenum", "oesophagus"}
ABDOMENS = 8


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("volumes")
    return {name: write_phantoms(name, folder / name, patients, seed=1) for name, patients in PATIENTS.items()}


@pytest.fixture(scope="module")
def abdomens():
    """Whole abdomens down to the pelvis, each with the organs that were drawn."""
    drawn = []
    for number in range(ABDOMENS):
        rng = numpy_generator(0, "test", "abdomen", number)
        drawn.append(abdominal.abdominal_scan(rng, amos22.GEOMETRY["CT", "small"], tumours=number % 7))
    return drawn


@pytest.fixture(scope="module")
def hearts():
    return {
        (kind, number): cardiac_scan(
            numpy_generator(0, "test", "heart", number), chd.GEOMETRY["small"], "CT", kind, whole_aorta=False
        )
        for kind in MALFORMATIONS
        for number in range(2)
    }


def files(root: Path) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.name != STAMP
    )


def values(path: Path) -> set[int]:
    return set(np.unique(nib.load(path).dataobj).tolist())


def where(scan, parts, name) -> np.ndarray:
    """World coordinates (N, 3) of the voxels of a part."""
    voxels = np.argwhere(scan.labels == parts.index(name) + 1)[:, ::-1]
    return nib.affines.apply_affine(scan.affine, voxels)


def middle(scan, parts, name) -> np.ndarray:
    return where(scan, parts, name).mean(0)


# ------------------------------------------------------------------------------------------------------- layouts
def test_btcv_has_the_names_of_rawdata(roots):
    training = [f"RawData/Training/img/img000{k}.nii.gz" for k in range(1, 5)]
    labels = [path.replace("/img", "/label") for path in training]
    assert files(roots["btcv"]) == sorted(["RawData/Testing/img/img0061.nii.gz", *training, *labels])
    seen = set().union(*(values(roots["btcv"] / path) for path in labels))
    assert seen == set(range(14))


def test_btcv_ids_are_those_of_the_release_as_far_as_it_goes():
    assert [btcv.training_id(k) for k in range(1, 31)] == [*range(1, 11), *range(21, 41)]
    ids = [btcv.training_id(k) for k in range(1, 801)]
    assert len(set(ids)) == 800 and not set(ids) & set(range(61, 81)) and max(ids) < 5001


def test_amos_tells_ct_from_mr_by_the_id_and_lists_every_file(roots):
    root = roots["amos22"]
    scans = {"Tr": ["0001", "0002", "0003", "0004", "0500"], "Va": ["0005"], "Ts": ["0006"]}
    expected = [f"images{part}/amos_{number}.nii.gz" for part, numbers in scans.items() for number in numbers]
    expected += [path.replace("images", "labels") for path in expected if "Ts" not in path]
    assert files(root) == sorted([*expected, "dataset.json"])
    about = json.loads((root / "dataset.json").read_text())
    assert len(about["labels"]) == 16 and about["labels"]["15"] == "prostate/uterus"
    assert [about[key] for key in ("numTraining", "numValidation", "numTest")] == [5, 1, 1]
    listed = [path for part in ("training", "validation", "test") for pair in about[part] for path in pair.values()]
    assert sorted(path.removeprefix("./") for path in listed) == sorted(expected)
    for path in expected:
        if path.startswith("images"):
            darkest = np.asarray(nib.load(root / path).dataobj).min()
            assert (darkest >= 0) == (int(path[-11:-7]) >= 500), path
    ids = [amos22.scan_id(k) for k in range(1, amos22.LIMIT + 1)]
    assert len(set(ids)) == len(ids) and max(k for k in ids if k < 500) < 500
    assert sum(k >= 500 for k in ids) == amos22.LIMIT // 6
    seen = set().union(*(values(root / path) for path in expected if path.startswith("labels")))
    assert seen == set(range(16))


def test_flare_has_labelled_unlabelled_and_validation_scans(roots):
    labelled = [f"Training/FLARE22_LabeledCase50/images/FLARE22_Tr_000{k}_0000.nii.gz" for k in (1, 2, 3)]
    labels = [path.replace("images", "labels").replace("_0000.nii", ".nii") for path in labelled]
    pool = [f"Training/FLARE22_UnlabeledCase1-1000/Case_0000{k}_0000.nii.gz" for k in (1, 2)]
    assert files(roots["flare22"]) == sorted([*labelled, *labels, *pool, "Validation/FLARETs_0001_0000.nii.gz"])
    assert set().union(*(values(roots["flare22"] / path) for path in labels)) == set(range(14))


def test_lits_is_uncompressed_and_has_tumours(roots):
    names = [f"Training Batch 1/{kind}-{k}.nii" for k in range(4) for kind in ("segmentation", "volume")]
    assert files(roots["lits"]) == sorted(names)
    seen = [values(roots["lits"] / name) for name in names if "segmentation" in name]
    assert all({0, 1} <= found <= {0, 1, 2} for found in seen) and {0, 1, 2} in seen
    counts = [numpy_generator(0, "phantom", "lits", k, "tumours").integers(0, lits.MOST + 1) for k in range(1, 200)]
    assert set(counts) == set(range(7))


def test_mmwhs_has_ct_and_mr_with_the_raw_label_values(roots):
    root = roots["mmwhs"]
    train = [f"{kind}_train/{kind}_train_100{k}" for kind in ("ct", "mr") for k in (1, 2)]
    test = [f"{kind}_test/{kind}_test_2001_image.nii.gz" for kind in ("ct", "mr")]
    pairs = [f"{name}_{part}.nii.gz" for name in train for part in ("image", "label")]
    assert files(root) == sorted([*pairs, *test])
    for name in train:
        assert values(root / f"{name}_label.nii.gz") == {0, 500, 600, 420, 550, 205, 820, 850}


def test_chd_has_every_malformation_and_values_up_to_seven(roots):
    names = [f"ct_100{k}_{part}.nii.gz" for k in range(1, 8) for part in ("image", "label")]
    assert files(roots["chd"]) == names
    assert all(values(roots["chd"] / name) == set(range(8)) for name in names if "label" in name)
    kinds = [chd.malformation(1, number) for number in range(1, 22)]
    assert all(set(kinds[k : k + 7]) == set(MALFORMATIONS) for k in (0, 7, 14))


def test_msd_is_a_decathlon_task_of_small_crops(roots):
    root = roots["msd"]
    about = json.loads((root / "dataset.json").read_text())
    assert about["labels"] == {"0": "background", "1": "Anterior", "2": "Posterior"}
    assert [pair["image"] for pair in about["training"]] == [
        f"./imagesTr/hippocampus_00{k}.nii.gz" for k in range(1, 6)
    ]
    assert about["test"] == ["./imagesTs/hippocampus_006.nii.gz"]
    for pair in about["training"]:
        image, label = nib.load(root / pair["image"]), nib.load(root / pair["label"])
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S") and image.header.get_zooms() == (1, 1, 1)
        assert 32 <= image.shape[0] < 40 and 46 <= image.shape[1] < 56 and 30 <= image.shape[2] < 41
        mask = np.asarray(label.dataobj)
        front, back = (np.argwhere(mask == value) for value in (1, 2))
        assert 500 < len(front) < 3500 and 500 < len(back) < 3500  # mm3, as in the release
        assert front[:, 1].mean() > back[:, 1].mean() + 8
        assert front[:, 2].min() < back[back[:, 1] < np.median(back[:, 1]), 2].mean()  # the tail climbs
        assert components(mask > 0, np.ones((3, 3, 3)))[1] == 1


@pytest.mark.parametrize("name", PATIENTS)
def test_readers_take_every_scan_and_labels_lie_on_their_images(roots, name):
    cases = read_dataset(name, roots[name])
    assert len(cases) == PATIENTS[name]
    for case in cases[:2]:
        volume = load_volume(case)
        assert volume.label is None or volume.label.max() < len(case.about.classes)
    for case in cases:
        if case.labels:
            image, label = nib.load(case.images[0]), nib.load(case.labels[0])
            np.testing.assert_array_equal(image.affine, label.affine)
            assert image.shape == label.shape and image.get_data_dtype() == np.int16


@pytest.mark.parametrize("name", ["btcv", "amos22", "mmwhs", "msd"])
def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_patients_and_workers(roots, tmp_path, name):
    fewer = write_phantoms(name, tmp_path / "fewer", patients=2, seed=1, workers=1)
    names = [path for path in files(fewer) if path != "dataset.json"]
    assert len(names) == 4
    assert all((fewer / path).read_bytes() == (roots[name] / path).read_bytes() for path in names)
    other = write_phantoms(name, tmp_path / "other", patients=1, seed=2)
    assert (other / names[0]).read_bytes() != (fewer / names[0]).read_bytes()


def test_release_label_values_are_those_of_the_release():
    assert abdominal.label_values(("background", "liver", "tumour")).tolist() == [0, 1, 2, *[0] * 15]

    def ids(module):
        return {organ: int(module.VALUES[k + 1]) for k, organ in enumerate(ORGANS) if module.VALUES[k + 1]}

    shared = {
        "spleen": 1, "right kidney": 2, "left kidney": 3, "gallbladder": 4, "oesophagus": 5, "liver": 6, "stomach": 7,
        "aorta": 8, "inferior vena cava": 9,
    }  # fmt: skip
    assert ids(btcv) == {
        **shared, "portal and splenic veins": 10, "pancreas": 11, "right adrenal": 12, "left adrenal": 13,
    }  # fmt: skip
    assert ids(amos22) == {
        **shared, "pancreas": 10, "right adrenal": 11, "left adrenal": 12, "duodenum": 13, "bladder": 14,
        "prostate or uterus": 15,
    }  # fmt: skip
    assert ids(flare22) == {
        "liver": 1, "right kidney": 2, "spleen": 3, "pancreas": 4, "aorta": 5, "inferior vena cava": 6,
        "right adrenal": 7, "left adrenal": 8, "gallbladder": 9, "oesophagus": 10, "stomach": 11, "duodenum": 12,
        "left kidney": 13,
    }  # fmt: skip
    assert dict(zip(PARTS, mmwhs.VALUES[1:].tolist(), strict=True)) == {
        "LV": 500, "RV": 600, "LA": 420, "RA": 550, "MYO": 205, "aorta": 820, "pulmonary artery": 850,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- anatomy
def test_most_patients_have_most_organs_and_some_lack_one(abdomens):
    share = {organ: np.mean([(scan.labels == k + 1).any() for scan in abdomens]) for k, organ in enumerate(ORGANS)}
    assert min(share.values()) >= 0.6
    lacking = [
        set(ORGANS) - {"tumour"} - draw_abdomen(numpy_generator(0, "test", "lack", k), "CT").organs for k in range(60)
    ]
    missing = [organ for organs in lacking for organ in organs]
    assert 0.05 < missing.count("gallbladder") / 60 < 0.3
    assert {"right kidney", "left kidney"} & set(missing) and not any(len(organs) > 4 for organs in lacking)
    assert not any({"right kidney", "left kidney"} <= organs for organs in lacking)
    assert not {"liver", "stomach", "aorta", "pancreas", "duodenum"} & set(missing)


def test_each_organ_is_one_piece(abdomens):
    for number, organ in enumerate(ORGANS, 1):
        if organ == "tumour":
            continue
        whole = []
        for scan in abdomens:
            if not (scan.labels == number).any():
                continue
            pieces, _ = components(scan.labels == number, np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())[1:]
            whole.append(sizes.max() / sizes.sum())
        assert np.median(whole) > 0.97 and min(whole) > 0.6, (organ, sorted(whole)[:3])


def test_organs_lie_where_they_do_in_a_body(abdomens):
    def higher(first, second, axis, least=0.0):  # mm, x to the right, y to the front, z up, in all who have both
        margins = [
            (middle(scan, ORGANS, first) - middle(scan, ORGANS, second))[axis]
            for scan in abdomens
            if {ORGANS.index(first) + 1, ORGANS.index(second) + 1} <= set(np.unique(scan.labels))
        ]
        assert min(margins) > least, (first, second, axis, min(margins))

    right, front, up = 0, 1, 2
    for second, least in (("spleen", 100), ("stomach", 50), ("aorta", 30)):
        higher("liver", second, right, least)
    higher("aorta", "spleen", right, 50)
    higher("right kidney", "left kidney", right, 90)
    higher("right adrenal", "left adrenal", right, 35)
    higher("inferior vena cava", "aorta", right, 10)
    higher("duodenum", "stomach", right, 20)
    higher("gallbladder", "aorta", right, 25)
    for organ in ("liver", "stomach", "pancreas", "duodenum", "gallbladder", "bladder"):
        higher(organ, "aorta", front)
    for organ in ("right kidney", "left kidney"):
        higher("pancreas", organ, front, 15)
        higher(organ, "bladder", up, 120)
        higher("liver", organ, up, 5)
    higher("right adrenal", "right kidney", up, 15)
    higher("left adrenal", "left kidney", up, 10)
    higher("oesophagus", "duodenum", up, 60)
    higher("bladder", "prostate or uterus", front)


def test_sizes_are_those_of_organs_and_the_hard_ones_are_small(abdomens):
    volume = {organ: [] for organ in ORGANS}  # mL
    for scan in abdomens:
        voxel = abs(np.linalg.det(scan.affine[:3, :3])) / 1000
        for number, organ in enumerate(ORGANS, 1):
            if (scan.labels == number).any():
                volume[organ].append((scan.labels == number).sum() * voxel)
    low_high = {
        "liver": (650, 2200), "spleen": (50, 420), "right kidney": (80, 300), "left kidney": (80, 300),
        "pancreas": (30, 130), "aorta": (50, 160), "right adrenal": (2, 9), "left adrenal": (2, 9),
        "gallbladder": (5, 80), "oesophagus": (5, 40), "stomach": (90, 500), "duodenum": (30, 140),
        "bladder": (25, 300), "portal and splenic veins": (8, 45),
    }  # fmt: skip
    outside = {
        organ: (min(volume[organ]), max(volume[organ]))
        for organ, (low, high) in low_high.items()
        if not low < min(volume[organ]) <= max(volume[organ]) < high
    }
    assert not outside
    mean = {organ: np.mean(sizes) for organ, sizes in volume.items()}
    assert max(mean[organ] for organ in HARD) < min(mean[organ] for organ in ("liver", "spleen", "stomach"))


def test_voxels_are_hounsfield_units(abdomens):
    for scan in abdomens:
        assert scan.image.dtype == np.int16 and scan.image.min() >= -1024 and scan.image.max() <= 3071
        level = {
            organ: np.median(scan.image[scan.labels == k])
            for k, organ in enumerate(ORGANS, 1)
            if (scan.labels == k).any()
        }
        assert np.percentile(scan.image, 2) < -950  # air around the patient
        assert 60 < level["liver"] < 150 and 90 < level["aorta"] < 220 and -10 < level["bladder"] < 40
        assert np.percentile(scan.image, 99.7) > 250  # bone
        assert -130 < np.percentile(scan.image[scan.image > -300], 25) < -60  # fat is a large part of the body
        if "gallbladder" in level:
            assert level["gallbladder"] < level["liver"] - 30
        if "tumour" in level:
            assert level["tumour"] < level["liver"] - 5


def test_thresholds_do_not_find_the_hard_organs(abdomens):
    for scan in abdomens:
        for organ in HARD:
            voxels = scan.image[scan.labels == ORGANS.index(organ) + 1]
            if voxels.size:
                low, high = np.percentile(voxels, (10, 90))
                alike = (scan.image >= low) & (scan.image <= high)
                assert alike.sum() > 10 * voxels.size, organ


def test_tumours_lie_in_the_liver_and_their_number_is_asked_for():
    counts = []
    for tumours in (0, 1, 6):
        rng = numpy_generator(0, "test", "tumours", tumours)
        scan = abdominal.abdominal_scan(rng, lits.GEOMETRY["small"], tumours=tumours)
        liver, tumour = scan.labels == ORGANS.index("liver") + 1, scan.labels == ORGANS.index("tumour") + 1
        counts.append(int(tumour.sum()))
        pieces, found = components(tumour, np.ones((3, 3, 3)))
        assert found <= tumours
        box = [slice(index.min(), index.max() + 1) for index in np.nonzero(liver | tumour)]
        assert tumour[tuple(box)].sum() == tumour.sum()
    assert counts[0] == 0 < min(counts[1:])


def test_hearts_have_seven_connected_parts_where_they_belong(hearts):
    for (kind, _), scan in hearts.items():
        for number, part in enumerate(PARTS, 1):
            pieces, count = components(scan.labels == number, np.ones((3, 3, 3)))
            assert count >= 1, (kind, part)
            sizes = np.bincount(pieces.ravel())[1:]
            assert sizes.max() / sizes.sum() > 0.85, (kind, part, sizes)
        at = {part: middle(scan, PARTS, part) for part in PARTS}
        side = -1 if kind == "dextrocardia" else 1
        assert side * (at["RA"] - at["LV"])[0] > 40 and side * (at["RV"] - at["LV"])[0] > 5
        assert (at["RV"] - at["LA"])[1] > 30  # the left atrium lies at the back
        assert min(at["aorta"][2], at["pulmonary artery"][2]) > max(at["LV"][2], at["RV"][2]) + 20
        muscle, cavity = (scan.labels == PARTS.index(part) + 1 for part in ("MYO", "LV"))
        assert np.median(scan.image[cavity]) > np.median(scan.image[muscle]) + 100


def test_malformations_are_what_they_are_called(hearts):
    def volume(kind, part):
        return np.mean([(hearts[kind, k].labels == PARTS.index(part) + 1).mean() for k in range(2)])

    def gap(scan, first, second):  # smallest distance between two parts, mm
        from scipy.spatial import cKDTree

        return cKDTree(where(scan, PARTS, first)).query(where(scan, PARTS, second))[0].min()

    assert volume("atrial septal defect", "RV") > 1.15 * volume("none", "RV")
    assert volume("tetralogy of Fallot", "pulmonary artery") < 0.75 * volume("none", "pulmonary artery")
    assert volume("pulmonary stenosis", "pulmonary artery") < 0.75 * volume("none", "pulmonary artery")
    for number in range(2):
        normal, switched = hearts["none", number], hearts["transposition", number]
        assert gap(normal, "aorta", "LV") < 4 and gap(normal, "pulmonary artery", "RV") < 4
        assert gap(normal, "pulmonary artery", "LV") > 8
        assert gap(switched, "pulmonary artery", "LV") < 4 and gap(switched, "aorta", "RV") < 4
        assert gap(normal, "LV", "RV") > 5 > gap(hearts["ventricular septal defect", number], "LV", "RV")
        assert gap(hearts["atrial septal defect", number], "LA", "RA") < 4


# --------------------------------------------------------------------------------------------------- orientation
def test_placing_in_another_orientation_keeps_every_voxel_at_its_place():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 99, (4, 5, 6))  # (Z, Y, X)
    stack = Stack.around((4, 5, 6), (5, 1.5, 1.5), (1, 2, 3), (1, 1, 1), turn(4, -3, 6), (10, -20, 30))
    for codes in ("RAS", "LPS", "LAS"):
        moved, affine = place(array, stack.affine, codes)
        assert "".join(nib.aff2axcodes(affine)) == codes
        back = nib.as_closest_canonical(nib.Nifti1Image(moved.astype(np.int16), affine))
        np.testing.assert_array_equal(np.asarray(back.dataobj), array.T)
        np.testing.assert_allclose(back.affine, stack.affine, atol=1e-5)
    np.testing.assert_allclose(nib.affines.apply_affine(stack.affine, (2.5, 2, 1.5)), (11, -18, 33))


def test_orientations_differ_between_patients_and_headers_are_truthful(roots):
    codes, oblique = set(), []
    for name in ("btcv", "amos22", "flare22", "lits", "mmwhs", "chd"):
        for case in read_dataset(name, roots[name]):
            affine = nib.load(case.images[0]).affine
            codes.add("".join(nib.aff2axcodes(affine)))
            oblique.append(bool((np.abs(affine[:3, :3]) > 1e-6).sum() > 3))
            if not case.labels or name in ("mmwhs", "chd"):
                continue
            mask = np.asarray(nib.load(case.labels[0]).dataobj)
            liver = nib.affines.apply_affine(affine, np.argwhere(mask == case.about.classes.index("liver"))).mean(0)
            centre = nib.affines.apply_affine(affine, (np.array(mask.shape) - 1) / 2)
            assert 25 < liver[0] - centre[0] < 90 and liver[2] > centre[2], case.case  # on the right, high up
    assert codes == {"RAS", "LPS", "LAS"} and 0 < np.mean(oblique) < 0.6


# --------------------------------------------------------------------------------------------------------- sizes
def test_small_scans_are_small_and_full_ones_have_the_releases_matrix():
    for module in (btcv, flare22, lits, chd):
        assert (module.GEOMETRY["small"].pixels, module.GEOMETRY["full"].pixels) == (96, 512)
    rng = np.random.default_rng(0)
    for _ in range(20):
        stack = btcv.GEOMETRY["small"].draw(rng, 0.0, (1.0, 1.0, 1.0))
        assert 44 <= stack.shape[0] <= 68
        assert lits.GEOMETRY["full"].draw(rng, 0.0, (1.0, 1.0, 1.0)).shape[0] > 95


def test_a_full_scan_shows_the_same_body_in_finer_voxels(tmp_path):
    """A few slices of it: the anatomy does not depend on the voxels that show it."""
    rng = numpy_generator(0, "test", "sizes")
    abdomen = draw_abdomen(rng, "CT")
    found = {}
    for pixels, pixel in ((96, 3.6), (480, 0.72)):
        stack = Stack.around((3, pixels, pixels), (8, pixel, pixel), (0, 0, 30), (1, 1, 1), np.eye(3), (0, 0, 0))
        still = Warp.draw(np.random.default_rng(0), stack, 80, 0.0)
        _, labels = draw_slab(abdomen.solids, ORGANS, stack, still, slice(0, 3), -1000)
        found[pixels] = np.bincount(labels.ravel(), minlength=len(ORGANS) + 1) * pixel**2
    for organ in ("liver", "spleen", "stomach", "aorta"):
        number = ORGANS.index(organ) + 1
        if found[480][number]:
            assert found[96][number] == pytest.approx(found[480][number], rel=0.12), organ


def test_slabs_join_without_a_seam(monkeypatch):
    abdomen = draw_abdomen(numpy_generator(0, "test", "slabs"), "CT")
    stack = Stack.around((12, 48, 48), (20, 7, 7), (0, 0, 0), (1, 1, 1), turn(5, 3, 2), (0, 0, 0))
    warp = Warp.draw(np.random.default_rng(0), stack, 80, 4)
    whole = draw_slab(abdomen.solids, ORGANS, stack, warp, slice(0, 12), -1000)
    monkeypatch.setattr("medlib.data.phantoms.solids.SLAB", 48 * 48 * 5)
    assert [slab.stop for slab in stack.slabs()] == [5, 10, 12]
    parts = [draw_slab(abdomen.solids, ORGANS, stack, warp, slab, -1000) for slab in stack.slabs()]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in parts]), whole[1])
    np.testing.assert_allclose(np.concatenate([signal for signal, _ in parts]), whole[0], atol=0.05)


# --------------------------------------------------------------------------------------------------------- tools
def test_a_ball_and_a_tube_have_their_volumes():
    stack = Stack.around((40, 44, 48), (1.5, 1, 1), (0, 0, 0), (1, 1, 1), turn(10, 20, 30), (5, 6, 7))
    still = Warp.draw(np.random.default_rng(0), stack, 50, 0.0)
    ball = Solid(ellipsoid((1, 2, 3), (9, 9, 9)), around((1, 2, 3), 9), ((0, 1.0),), "ball")
    signal, _ = draw_slab([ball], ["ball"], stack, still, slice(0, 40), 0.0)
    assert signal.sum() * 1.5 == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.01)
    tube = Tube.through([(-10, 0, 0), (0, 0, 0), (10, 0, 0)], 5)
    signal, labels = draw_slab(
        [Solid(tube, tube.box(), ((0, 1.0),), "tube")], ["tube"], stack, still, slice(0, 40), 0.0
    )
    exact = np.pi * 25 * 20 + 4 / 3 * np.pi * 125
    assert signal.sum() * 1.5 == pytest.approx(exact, rel=0.02) and labels.sum() * 1.5 == pytest.approx(exact, rel=0.1)


def test_a_tubes_distance_is_exact_near_it_and_far_elsewhere():
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.arange(-20, 21, 2, dtype=np.float32),) * 3, indexing="ij")
    tube = Tube.through(rng.uniform(-12, 12, (4, 3)), [2, 3, 4, 3])
    distance = tube(Block(x, y, z, 1.0))
    voxels = np.stack([x, y, z], -1).reshape(-1, 1, 3)
    t = np.linspace(0, 1, 400)[:, None]
    dense = np.concatenate([a + t * (b - a) for a, b in zip(tube.points, tube.points[1:], strict=False)])
    radii = np.concatenate([a + t[:, 0] * (b - a) for a, b in zip(tube.radii, tube.radii[1:], strict=False)])
    exact = (np.linalg.norm(voxels - dense, axis=2) - radii).min(1).reshape(x.shape)
    near = exact < 4
    np.testing.assert_allclose(distance[near], exact[near], atol=0.15)
    assert (distance[~near] > 3.8).all()


def test_a_field_is_the_cubic_spline_of_its_controls_and_has_unit_variance():
    field = Field.draw(np.random.default_rng(0), (90, 100, 110), 9.0)
    z, y, x = np.linspace(0, 90, 31), np.linspace(0, 100, 29), np.linspace(0, 110, 27)
    lattice = np.stack(np.meshgrid(z, y, x, indexing="ij")) / 9 + 1
    expected = map_coordinates(field.control, lattice, order=3, prefilter=False)
    found = field.at(z, y, x)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.std() == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(field.at(z[10:20], y, x), found[10:20])


def test_layers_labels_and_limits_follow_the_painting_order():
    stack = Stack.around((21, 21, 21), (1, 1, 1), (0, 0, 0), (1, 1, 1), np.eye(3), (0, 0, 0))
    still = Warp.draw(np.random.default_rng(0), stack, 50, 0.0)

    def ball(radius, value, label, **options):
        return Solid(ellipsoid((0, 0, 0), (radius,) * 3), around((0, 0, 0), radius), ((0, value),), label, **options)

    def centre_and_edge(*solids):
        signal, labels = draw_slab(solids, ["organ", "lump"], stack, still, slice(0, 21), 0.0)
        return signal[10, 10, 10], labels[10, 10, 10], labels[10, 10, 16]

    organ = ball(8, 1.0, "organ")
    assert centre_and_edge(organ) == (1, 1, 1)
    assert centre_and_edge(organ, ball(3, 2.0, "")) == (2, 1, 1)  # a vessel inside: still the organ
    assert centre_and_edge(organ, ball(3, 2.0, None)) == (2, 0, 1)  # something else in its place
    assert centre_and_edge(organ, ball(3, 2.0, "lump", within="organ")) == (2, 2, 1)
    assert centre_and_edge(ball(3, 1.0, "organ"), ball(8, 2.0, "lump", within="organ")) == (2, 2, 0)


def test_ct_noise_grows_with_the_body_and_streaks_with_bone():
    rng = numpy_generator(0, "test", "ct")
    y, x = np.mgrid[-64:64, -64:64] * 3.0

    def noise(radius, bone=0.0, streaks=0.0):
        signal = np.full((4, 128, 128), -1000, np.float32)
        signal += 1040 * coverage(np.hypot(x, y) - radius, 3.0)
        signal[:, (np.hypot(x - 60, y) < 25)] += bone
        stored = ct_scan(signal, rng, pixel=3.0, sigma=10, blur=2.0, streaks=streaks)
        return stored[:, (np.hypot(x + 20, y) < 25)].std()

    assert 5 < noise(60) < noise(150) < 40
    assert noise(150, bone=900, streaks=40) > 1.2 * noise(150, bone=900)
