"""What is known about each data set before it is opened, in one table: readers, preparation and figures all use it.

An organ has one name and one colour in every data set that shows it. Colours come from the palettes of Okabe and Ito
and of Paul Tol, assigned so that organs that touch differ by at least 30 in CIELAB for readers with normal vision,
protanopia, deuteranopia and tritanopia.

Windows and 3D grids are those of the code that the papers' authors build on: DHC (github.com/xmed-lab/DHC) cuts at
-75..275 HU and learns on 64 x 128 x 128 voxels, GuidedNet (github.com/kimjisoo12/GuidedNet) resamples to 1.2225 mm in
plane and 2.5 mm between slices; MONA's LiTS is cut at -200..250 HU. MMWHS and CHD are cut at percentiles (CORAL).
"""

from collections.abc import Sequence
from typing import Any

from .cases import DatasetInfo

CLEAR = "#00000000"
COLOURS = {
    "background": CLEAR,
    "LV": "#D55E00",
    "RV": "#0072B2",
    "LA": "#E69F00",
    "RA": "#56B4E9",
    "MYO": "#009E73",
    "aorta": "#CC79A7",
    "ascending aorta": "#CC79A7",
    "pulmonary artery": "#882255",
    "spleen": "#004488",
    "right kidney": "#B040FF",
    "left kidney": "#77AADD",
    "gallbladder": "#EECC66",
    "oesophagus": "#999933",
    "liver": "#882255",
    "stomach": "#66CCEE",
    "inferior vena cava": "#332288",
    "portal and splenic veins": "#EE6677",
    "pancreas": "#F0E442",
    "right adrenal": "#EE8866",
    "left adrenal": "#D55E00",
    "duodenum": "#CC3311",
    "bladder": "#117733",
    "prostate or uterus": "#E69F00",
    "tumour": "#FFAABB",
}
CYCLE = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#332288", "#117733", "#882255",
    "#EE6677", "#999933", "#77AADD", "#B040FF", "#FFAABB", "#66CCEE",
)  # fmt: skip


def colours_of(classes: Sequence[str]) -> tuple[str, ...]:
    """A colour per class: a known organ's own, for other names the next free one of a fixed cycle.

    No two of the first 16 unknown classes share one.
    """
    known = [COLOURS.get(name.lower(), COLOURS.get(name)) for name in classes]
    free = [colour for colour in CYCLE if colour not in known] or list(CYCLE)
    unknown = 0
    found: list[str] = []
    for colour in known:
        if colour is None or colour in found:
            colour = free[unknown % len(free)]
            unknown += 1
        found.append(colour)
    return tuple(found)


def _described(classes: Sequence[str], **facts: Any) -> DatasetInfo:
    names = ("background", *classes)
    return DatasetInfo(classes=names, colours=tuple(COLOURS[name] for name in names), **facts)


_ABDOMEN_3D = {"window": (-75.0, 275.0), "patch": (64, 128, 128), "volume_spacing": (2.5, 1.2225, 1.2225)}

DESCRIPTIONS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        _described(
            ("RV", "MYO", "LV"),
            name="acdc",
            title="ACDC (Automated Cardiac Diagnosis Challenge, short-axis cine MRI)",
            modality="MR",
            size=352,
            spacing=1.25,
            licence="research only; cite Bernard et al., IEEE TMI 2018",
            url="https://humanheart-project.creatis.insa-lyon.fr/database/",
            patient_rule="the folder: patient001 has its ED and ES frame and its cine series",
        ),
        _described(
            ("LV", "RV", "LA", "RA", "MYO", "ascending aorta", "pulmonary artery"),
            name="mmwhs",
            title="MM-WHS 2017 (whole heart, 20 CT and 20 MR of other patients)",
            modality="CT and MR",
            size=256,
            spacing=1.0,
            licence="research only, after registration; cite Zhuang and Shen, Medical Image Analysis 2016",
            url="https://zmiclab.github.io/zxh/0/mmwhs/",
            patient_rule="the scan: CT and MR are of different patients, ct_train_1001 and mr_train_1001 are two",
            patch=(64, 128, 128),
            volume_spacing=(2.5, 1.2225, 1.2225),
        ),
        _described(
            ("LV", "RV", "LA", "RA", "MYO", "aorta", "pulmonary artery"),
            name="chd",
            title="CHD-68 (congenital heart disease, CT)",
            modality="CT",
            size=512,
            spacing=1.0,
            licence="see its page; cite Xu et al., MICCAI 2019",
            url="https://www.kaggle.com/datasets/xiaoweixumedicalai/chd68-segmentation-dataset-miccai19",
            patient_rule="the scan: one CT a patient, ct_1001 to ct_1128 with gaps",
        ),
        _described(
            ("liver", "tumour"),
            name="lits",
            title="LiTS 2017 (Liver Tumor Segmentation Challenge, CT)",
            modality="CT",
            size=256,
            spacing=None,
            licence="CC BY-NC-ND 4.0; cite Bilic et al., Medical Image Analysis 2023",
            url="https://competitions.codalab.org/competitions/17094",
            patient_rule="the scan: the release gives no other id",
            window=(-200.0, 250.0),
        ),
        _described(
            (
                "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
                "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal", "left adrenal",
            ),
            name="btcv",
            title="BTCV (Beyond the Cranial Vault, abdominal CT; also called Synapse)",
            modality="CT",
            size=256,
            spacing=None,
            licence="Synapse terms of use, after registration; cite Landman et al., MICCAI workshop 2015",
            url="https://www.synapse.org/#!Synapse:syn3193805/wiki/89480",
            patient_rule="the scan: img0001",
            **_ABDOMEN_3D,
        ),
        _described(
            (
                "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal",
                "left adrenal", "gallbladder", "oesophagus", "stomach", "duodenum", "left kidney",
            ),
            name="flare22",
            title="FLARE22 (abdominal CT, 50 labelled scans and a large unlabelled pool)",
            modality="CT",
            size=256,
            spacing=None,
            licence="see its page; cite Ma et al., Lancet Digital Health 2024",
            url="https://zenodo.org/records/7860267",
            patient_rule="the scan: FLARE22_Tr_0001, Case_00001",
            **_ABDOMEN_3D,
        ),
        _described(
            (
                "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
                "inferior vena cava", "pancreas", "right adrenal", "left adrenal", "duodenum", "bladder",
                "prostate or uterus",
            ),
            name="amos22",
            title="AMOS22 (abdominal multi-organ, 300 CT and 60 MR with labels)",
            modality="CT and MR",
            size=256,
            spacing=None,
            licence="see its page; cite Ji et al., NeurIPS 2022",
            url="https://amos22.grand-challenge.org",
            patient_rule="the scan: amos_0001; ids below 500 are CT, the others MR",
            **_ABDOMEN_3D,
        ),
        _described(
            (),
            name="msd",
            title="Medical Segmentation Decathlon, any task, and your own data in that form",
            modality="as dataset.json says",
            size=256,
            spacing=None,
            licence="CC BY-SA 4.0; cite Antonelli et al., Nature Communications 2022",
            url="https://medicaldecathlon.com",
            patient_rule='the scan, or what "patients" in dataset.json says: {"scan_1": "anna", "scan_2": "anna"}',
        ),
    )
}  # fmt: skip
"""Data set name -> description. `msd` has its classes, and its grid, in the files: see its cases' `about`."""


def overview() -> str:
    """All data sets as the Markdown table that stands in data/README.md."""
    rows = [
        "| name | what, classes | window, 3D patch and spacing (z, y, x) | licence | where to get it |",
        "|---|---|---|---|---|",
    ]
    for info in DESCRIPTIONS.values():
        classes = ", ".join(info.classes[1:]) or "those of its `dataset.json`"
        grid = [f"{info.window[0]:g} to {info.window[1]:g} HU"] if info.window else []
        if info.patch and info.volume_spacing:
            patch, spacing = (" x ".join(f"{n:g}" for n in numbers) for numbers in (info.patch, info.volume_spacing))
            grid.append(f"{patch} voxels of {spacing} mm")
        cells = (f"`{info.name}`", f"{info.title}: {classes}", "; ".join(grid), info.licence, f"<{info.url}>")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
