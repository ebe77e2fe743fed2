"""The readers of body scans: what they find in a sound tree, and what they say about every broken one."""

import gzip
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.data import DataError, dataset_info, labelled_cases, load_volume, read_dataset
from medlib.data.readers import find_reader
from medlib.data.readers.mmwhs import VALUES

from .trees import TREES, body, save_pair, save_scan, write_json

REAL = os.environ.get("MEDLIB_DATA")


def by_name(cases):
    return {case.case: case for case in cases}


@pytest.fixture(params=TREES)
def name(request):
    return request.param


@pytest.fixture
def root(name, tmp_path):
    TREES[name].write(tmp_path / "data")
    return tmp_path / "data"


# ------------------------------------------------------------------------------------------------ sound trees


def test_what_a_sound_tree_holds(name, root):
    cases = read_dataset(name, root)
    tree = TREES[name]
    assert [case.case for case in labelled_cases(cases)] == sorted(tree.labelled)
    assert {case.case for case in cases if not case.labels} == set(tree.unlabelled)
    assert len({case.patient for case in cases}) == len(cases)
    assert {case.dataset for case in cases} == {name}
    assert {case.info["axes"] for case in cases} == {"LPS"}


def test_every_scan_loads_as_it_was_drawn(name, root):
    tree = TREES[name]
    for case in read_dataset(name, root):
        volume = load_volume(case)
        assert (volume.image.dtype, volume.spacing) == (np.float32, pytest.approx((3.0, 2.0, 1.0)))
        if case.case == tree.case:
            seed = int(tree.case.split("_")[-1].removeprefix("img").removeprefix("volume-"))
            np.testing.assert_array_equal(volume.image, body(seed)[0])
        if case.labels:
            np.testing.assert_array_equal(volume.label, body()[1])
            assert volume.label.dtype == np.uint8 and not volume.remarks
        else:
            assert volume.label is None


def test_parts_are_those_of_the_release(tmp_path):
    expected = {
        "btcv": {"img0001": None, "img0061": "test"},
        "lits": {"volume-0": None, "test-volume-0": "test"},
        "mmwhs": {"ct_train_1001": None, "ct_test_2001": "test"},
        "flare22": {"FLARE22_Tr_0001": None, "Case_00001": None, "FLARETs_0001": "val"},
        "amos22": {"amos_0001": "train", "amos_0008": "val", "amos_0002": "test"},
        "msd": {"hippocampus_001": None, "hippocampus_002": "test"},
    }
    for name, parts in expected.items():
        TREES[name].write(tmp_path / name)
        cases = by_name(read_dataset(name, tmp_path / name))
        assert {case: cases[case].part for case in parts} == parts


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("btcv", "RawData"),
        ("btcv", "RawData/Training"),
        ("flare22", "Training"),
        ("flare22", "Training/FLARE22_LabeledCase50"),
        ("lits", "Training Batch 2"),
        ("mmwhs", "mr_train"),
    ],
)
def test_a_folder_further_down_may_be_the_root(name, below, tmp_path):
    TREES[name].write(tmp_path)
    found = labelled_cases(read_dataset(name, tmp_path / below))
    assert found and {case.case for case in found} <= set(TREES[name].labelled)


def test_modalities_are_told_apart(tmp_path):
    for name, expected in (("amos22", {"amos_0001": "CT", "amos_0507": "MR"}), ("mmwhs", {"mr_train_1001": "MR"})):
        TREES[name].write(tmp_path / name)
        cases = by_name(read_dataset(name, tmp_path / name))
        assert {case: cases[case].info["modality"] for case in expected} == expected
    assert "one of them at a time" in find_reader("mmwhs", tmp_path / "mmwhs").notes(tmp_path / "mmwhs")[0]
    assert find_reader("mmwhs", tmp_path / "mmwhs/mr_train").notes(tmp_path / "mmwhs/mr_train") == []


def test_uncompressed_files_are_read_too(name, root):
    for path in root.rglob("[!.]*.nii.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert load_volume(by_name(read_dataset(name, root))[TREES[name].case]).label is not None


def test_no_tree_is_read_as_another_data_set(name, root):
    for other in sorted(set(TREES) - {name, "msd"}):
        with pytest.raises(DataError):
            read_dataset(other, root)


# ------------------------------------------------------------------------------------------------ broken trees


def rewrite(path: Path, change, affine=None) -> None:
    file = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(file.dataobj)), file.affine if affine is None else affine), path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def doubled(path: Path) -> None:
    other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(path.name + ".gz")
    shutil.copy(path, other)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: 400 if path.suffix == ".nii" else len(data) // 2])


FOUND = {  # fault: (which file, how to break it, what the message says beside the file's name)
    "missing label": ("label", lambda p: p.unlink(), "has no label"),
    "missing image": ("image", lambda p: p.unlink(), "has no image"),
    "empty image": ("image", lambda p: p.write_bytes(b""), "is empty"),
    "empty label": ("label", lambda p: p.write_bytes(b""), "is empty"),
    "symlink loop": ("image", loop, "cannot be opened"),
    "no nifti": ("image", lambda p: p.write_bytes(b"x" * 3000), "cannot be read as NIfTI"),
    "duplicate id": ("image", doubled, "are both the image"),
    "duplicate label": ("label", doubled, "are both the label"),
    "4D image": ("image", lambda p: rewrite(p, lambda a: np.stack([a, a], -1)), "expected 3 axes"),
    "4D label": ("label", lambda p: rewrite(p, lambda a: a[..., None].repeat(2, -1)), "expected 3 axes"),
    "swapped axes": ("label", lambda p: rewrite(p, lambda a: a.swapaxes(0, 2)), "they are not of one scan"),
    "flat affine": (
        "image",
        lambda p: rewrite(p, lambda a: a, np.eye(4)[[0, 1, 1, 3]][:, [0, 1, 1, 3]]),
        "affine that no scan can have",
    ),
    "wrong name": (
        "image",
        lambda p: p.rename(p.with_name("Anna.nii.gz")),
        "Anna.nii.gz (is not named like|has no label)",
    ),
}
LOADED = {
    "truncated image": ("image", cut, "cut off or damaged|cannot be read"),
    "truncated label": ("label", cut, "cut off or damaged|cannot be read"),
    "wrong label values": ("label", lambda p: rewrite(p, lambda a: (a + 999).astype(np.int16)), "has label values"),
    "negative label": ("label", lambda p: rewrite(p, lambda a: (a - 1).astype(np.int16)), "has label values"),
    "half a label": ("label", lambda p: rewrite(p, lambda a: a.astype(np.float32) + 0.5), "no class numbers"),
    "nan label": ("label", lambda p: rewrite(p, lambda a: np.where(a > 0, np.nan, 0).astype(np.float32)), "no class"),
    "nan image": ("image", lambda p: rewrite(p, lambda a: a * np.float32(np.nan)), "not finite"),
    "constant image": ("image", lambda p: rewrite(p, lambda a: a * 0), "everywhere"),
    "label moved since": ("label", lambda p: rewrite(p, lambda a: a, np.diag([9.0, 9, 9, 1])), "voxels away"),
    "gone since": ("image", lambda p: p.unlink(), "is gone"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FOUND)
def test_a_broken_tree_is_refused_when_it_is_read(name, root, fault):
    which, break_it, message = FOUND[fault]
    tree = TREES[name]
    path = root / getattr(tree, which)
    break_it(path)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(name, root)
    assert fault == "wrong name" or path.name.removesuffix(".gz") in str(caught.value)


@pytest.mark.parametrize("fault", LOADED)
def test_a_broken_file_is_refused_when_it_is_loaded(name, root, fault):
    which, break_it, message = LOADED[fault]
    if name == "chd" and fault == "wrong label values":
        pytest.skip("larger values become background in CHD: they have a test of their own")
    case = by_name(read_dataset(name, root))[TREES[name].case]
    path = root / getattr(TREES[name], which)
    break_it(path)
    with pytest.raises((DataError, FileNotFoundError), match=message) as caught:
        load_volume(case)
    assert path.name in str(caught.value)


def test_a_folder_that_is_a_loop_is_refused(tmp_path):
    (tmp_path / "ct_train").symlink_to(tmp_path / "ct_train")
    with pytest.raises(DataError, match="holds nothing of the expected form.*ct_train_1001_image"):
        read_dataset("mmwhs", tmp_path)


def test_a_scan_in_two_part_folders_is_refused(tmp_path):
    TREES["mmwhs"].write(tmp_path)
    for path in list((tmp_path / "ct_train1").iterdir()):
        shutil.copy(path, tmp_path / "ct_train2")
    with pytest.raises(DataError, match="ct_train2.*ct_train_1001_image.nii.gz and .*ct_train1.* are both the image"):
        read_dataset("mmwhs", tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(TREES)), st.sampled_from(["image", "label"]), st.data())
def test_any_damage_is_an_error_that_names_the_file_or_changes_nothing(name, which, data):
    """Cut anywhere, or with one byte changed anywhere, a file is refused in words or still reads as some scan."""
    tree = TREES[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tree.write(root)
        path = root / getattr(tree, which)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content = content[:place]
        else:
            content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            volume = load_volume(by_name(read_dataset(name, root))[tree.case])
        except DataError as error:
            number = "".join(filter(str.isdigit, Path(tree.image).stem.split("_0000")[0]))[-2:]
            assert number in str(error)
        else:
            assert volume.label is not None and volume.label.shape == volume.image.shape


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(TREES)),
    st.tuples(*[st.integers(2, 9)] * 3),
    st.sampled_from([np.uint8, np.int16, np.int32, np.uint16, np.float32, np.float64]),
    st.sampled_from([np.int16, np.int32, np.float32, np.float64]),
    st.integers(0, 2**16),
)
def test_any_scan_written_is_the_scan_read(name, shape, kind, image_kind, seed):
    """Any shape, any number type of image and label, any labels, in every layout."""
    tree = TREES[name]
    random = np.random.default_rng(seed)
    image = random.integers(-1000, 1000, shape).astype(image_kind)
    image.flat[0] += 1 if image.min() == image.max() else 0
    classes = len(dataset_info(name).classes) if name != "msd" else 3
    label = random.integers(0, classes, shape)
    inverse = np.array(sorted(VALUES, key=lambda value: VALUES[value])) if name == "mmwhs" else np.arange(classes)
    stored = inverse[label]
    kind = np.int16 if name == "mmwhs" and kind == np.uint8 else kind
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_scan(root / tree.image, image)
        save_scan(root / tree.label, stored.astype(kind))
        if name == "msd":
            write_json(root)
        (case,) = read_dataset(name, root)
        volume = load_volume(case)
    assert case.case == tree.case
    np.testing.assert_array_equal(volume.image, image.astype(np.float32))
    np.testing.assert_array_equal(volume.label, label)


# ---------------------------------------------------------------------------------------- the traps of each release


def test_the_values_of_mmwhs_become_classes_in_order(tmp_path):
    raw = [500, 600, 420, 550, 205, 820, 850]
    label = np.zeros((4, 4, 4), np.int16)
    label.flat[:7] = raw
    save_scan(tmp_path / "ct_train_1001_image.nii.gz", body(shape=(4, 4, 4))[0])
    save_scan(tmp_path / "ct_train_1001_label.nii.gz", label)
    (case,) = read_dataset("mmwhs", tmp_path)
    assert load_volume(case).label.flat[:8].tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert case.about.classes[1:] == ("LV", "RV", "LA", "RA", "MYO", "ascending aorta", "pulmonary artery")


def test_the_stray_421_is_read_as_left_atrium_and_said(tmp_path):
    save_pair(tmp_path, "ct_train_1001_image.nii.gz", "ct_train_1001_label.nii.gz", values=(0, 420, 421))
    volume = load_volume(read_dataset("mmwhs", tmp_path)[0])
    assert set(np.unique(volume.label)) == {0, 3}
    assert volume.remarks == ("ct_train_1001_label.nii.gz: 16 voxels have the value 421, read as class 3",)


def test_larger_values_of_chd_become_background_and_are_said(tmp_path):
    save_pair(tmp_path, "ct_1001_image.nii.gz", "ct_1001_label.nii.gz", values=(0, 7, 9))
    volume = load_volume(read_dataset("chd", tmp_path)[0])
    assert set(np.unique(volume.label)) == {0, 7}
    assert "have the value 9, read as class 0" in volume.remarks[0]


def test_encrypted_test_labels_of_mmwhs_are_left_alone(tmp_path):
    TREES["mmwhs"].write(tmp_path)
    (tmp_path / "ct_test/ct_test_2001_label_encrypt_1mm.nii.gz").write_bytes(b"secret")
    assert by_name(read_dataset("mmwhs", tmp_path))["ct_test_2001"].labels == ()


def test_a_missing_pool_of_flare_is_noted(tmp_path):
    TREES["flare22"].write(tmp_path)
    assert find_reader("flare22", tmp_path).notes(tmp_path) == []
    shutil.rmtree(tmp_path / "Training/FLARE22_UnlabeledCase1-500")
    assert "the unlabelled pool is not here" in find_reader("flare22", tmp_path).notes(tmp_path)[0]


def test_images_that_dataset_json_lists_and_are_not_there_are_noted(tmp_path):
    for name in ("msd", "amos22"):
        TREES[name].write(tmp_path / name)
        write_json(tmp_path / name, training=[{"image": "./imagesTr/gone.nii.gz"}], test=3)
        notes = find_reader(name, tmp_path / name).notes(tmp_path / name)
        assert notes == ["1 of 1 training images of dataset.json are not here (./imagesTr/gone.nii.gz, ...)"]


# ------------------------------------------------------------------------------------------------ any Decathlon task


def test_a_task_brings_its_classes_and_its_grid(tmp_path):
    TREES["msd"].write(tmp_path)
    about = read_dataset("msd", tmp_path)[0].about
    assert about.name == "msd" and about.title.endswith("Hippocampus")
    assert about.classes == ("background", "Anterior", "Posterior")
    assert (about.modality, about.size, about.spacing) == ("MRI", 32, 1.0)
    assert (about.patch, about.volume_spacing) == ((16, 16, 16), (3.0, 2.0, 1.0))
    assert dataset_info("msd").classes == ("background",)


def test_organs_keep_their_colours_in_a_task(tmp_path):
    TREES["msd"].write(tmp_path)
    write_json(tmp_path, labels={"0": "background", "1": "liver", "2": "lump"})
    about = read_dataset("msd", tmp_path)[0].about
    liver = dataset_info("btcv").colours[dataset_info("btcv").classes.index("liver")]
    assert about.colours[1] == liver and len(set(about.colours)) == 3


def test_of_several_channels_the_first_is_taken_and_said(tmp_path):
    TREES["msd"].write(tmp_path)
    write_json(tmp_path, modality={"0": "FLAIR", "1": "T1w"})
    with pytest.raises(DataError, match="hippocampus_00.*expected 4 axes"):
        read_dataset("msd", tmp_path)
    for path in tmp_path.rglob("images*/h*.nii.gz"):
        rewrite(path, lambda a: np.stack([a, -a], -1))
    volume = load_volume(by_name(read_dataset("msd", tmp_path))["hippocampus_001"])
    np.testing.assert_array_equal(volume.image, body(1)[0])
    assert find_reader("msd", tmp_path).notes(tmp_path) == [
        "images have 2 channels (FLAIR, T1w): the first, FLAIR, is taken"
    ]
    write_json(tmp_path, modality={"0": "FLAIR", "1": "T1w", "2": "T2w"})
    with pytest.raises(DataError, match="has 2 channels, dataset.json names 3"):
        read_dataset("msd", tmp_path)


def test_scans_of_one_patient_are_kept_together(tmp_path):
    TREES["msd"].write(tmp_path)
    write_json(tmp_path, patients={"hippocampus_001": "anna", "hippocampus_003": "anna"})
    assert [case.patient for case in read_dataset("msd", tmp_path)] == ["anna", "hippocampus_002", "anna"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "dataset.json is missing"),
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list"),
        ({"modality": None}, 'has no "modality"'),
        ({"modality": {"1": "CT"}}, 'has no "modality"'),
        ({"labels": ["a"]}, "has the labels"),
        ({"labels": {"0": "background", "2": "late"}}, "without gaps"),
        ({"labels": {"background": 0, "liver": 1}}, "without gaps"),
        ({"patients": ["anna"]}, "has the patients"),
        ({"window": [275, -75]}, "has the window"),
        ({"window": "-75..275"}, "has the window"),
    ],
)
def test_a_broken_dataset_json_is_refused(tmp_path, content, message):
    TREES["msd"].write(tmp_path)
    path = tmp_path / "dataset.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(DataError, match=message):
        read_dataset("msd", tmp_path)


# ----------------------------------------------------------------------------------------------- the real files


@pytest.mark.skipif(not REAL, reason="MEDLIB_DATA does not point at real data")
def test_the_real_hippocampi():
    cases = read_dataset("msd", Path(REAL or "") / "Task04_Hippocampus")
    assert Counter(bool(case.labels) for case in cases) == {True: 200}
    assert cases[0].about.classes == ("background", "Anterior", "Posterior")
    for case in cases[::20]:
        volume = load_volume(case)
        rows = [np.argwhere(volume.label == value)[:, 1].mean() for value in (1, 2)]
        assert rows[0] < rows[1], f"{case.case}: the anterior part lies behind the posterior one"


@pytest.mark.skipif(not REAL, reason="MEDLIB_DATA does not point at real data")
def test_the_real_abdomen():
    volume = load_volume(read_dataset("btcv", Path(REAL or "") / "btcv_example")[0])
    names = volume.case.about.classes
    centre = {n: np.argwhere(volume.label == i).mean(axis=0) for i, n in enumerate(names) if (volume.label == i).any()}
    assert len(centre) == 13 and "oesophagus" not in centre
    assert centre["liver"][2] < centre["spleen"][2], "the patient's right must be on the left of the picture"
    assert centre["right kidney"][2] < centre["aorta"][2] < centre["left kidney"][2]
    assert centre["stomach"][1] < centre["left kidney"][1], "the front must be on top"
    assert centre["spleen"][0] > centre["left kidney"][0], "slices must run to the head"
    assert 30 < volume.image[volume.label == names.index("liver")].mean() < 150, "no Hounsfield units"


def test_a_decathlon_ct_takes_its_window_from_the_json_and_is_warned_about_without(tmp_path):
    TREES["msd"].write(tmp_path)
    write_json(tmp_path, modality={"0": "CT"}, window=[-75, 275])
    assert read_dataset("msd", tmp_path)[0].about.window == (-75, 275)
    assert not any("HU" in line for line in find_reader("msd", tmp_path).notes(tmp_path))
    write_json(tmp_path, modality={"0": "CT"})
    assert any("cut at no HU" in line for line in find_reader("msd", tmp_path).notes(tmp_path))
