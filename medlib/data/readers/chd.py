"""The 68 CT scans of congenital heart disease of Xu et al. (MICCAI 2019), which PCL and CORAL pre-train on.

Label values are 1 LV, 2 RV, 3 LA, 4 RA, 5 myocardium, 6 aorta, 7 pulmonary artery. Some files hold larger values; they
become background, as in PCL's generate_chd.py, and a remark says so. ImageCHD (110 scans) has the same form.
"""

from pathlib import Path

from ..cases import Case, Volume
from ..descriptions import DESCRIPTIONS
from ..scans import Source, find_scans, load_scan, recognises

INFO = DESCRIPTIONS["chd"]
LAYOUT = "ct_1001_image.nii.gz and ct_1001_label.nii.gz, all in one folder"
SOURCES = (Source(images=(".",), image="ct_{}_image", label="ct_{}_label", case="ct_{}"),)
VALUES = {value: value for value in range(8)}
STRAY = {value: 0 for value in range(8, 256)}


def recognise(root: Path) -> bool:
    return recognises(root, SOURCES)


def find(root: Path) -> list[Case]:
    return find_scans(INFO, "chd", root, SOURCES)


def notes(root: Path) -> list[str]:
    return []


def load(case: Case) -> Volume:
    return load_scan(case, VALUES, STRAY)
