"""The papers' numbers, spot-checked against the papers, and what must hold for all of them."""

import pytest

from medlib.results import published, sources


def value(**wanted):
    rows = published(paper=wanted.pop("paper"), table=wanted.pop("table"))
    for column, wish in wanted.items():
        rows = rows[rows[column] == wish]
    assert len(rows) == 1, rows
    return rows.iloc[0]["value"]


@pytest.mark.parametrize(
    "row, number",
    [
        ({"paper": "coral", "table": "1", "method": "CORAL", "labelled": 2}, 0.746),
        ({"paper": "coral", "table": "1", "method": "CORAL", "labelled": 10}, 0.903),
        ({"paper": "coral", "table": "1", "method": "PCL", "labelled": 6}, 0.850),
        ({"paper": "coral", "table": "1", "method": "CORAL (RAL only)", "labelled": 10}, 0.860),
        ({"paper": "coral", "table": "2", "method": "KAF"}, 0.693),
        ({"paper": "ideal", "table": "1", "dataset": "acdc", "setting": "1.25%", "metric": "asd"}, 0.677),
        ({"paper": "ideal", "table": "1", "dataset": "mmwhs", "setting": "100%", "metric": "hd"}, 2.183),
        ({"paper": "ideal", "table": "2", "method": "Self train", "dataset": "mmwhs", "setting": "40%"}, 0.801),
        (
            {"paper": "mona", "table": "I", "method": "MONA", "dataset": "acdc", "setting": "1%", "metric": "dice"},
            0.826,
        ),
        ({"paper": "mona", "table": "I", "method": "MONA", "dataset": "lits", "setting": "10%", "metric": "asd"}, 18.0),
        ({"paper": "mona", "table": "II", "method": "UNET-F", "metric": "dice"}, 0.858),
        ({"paper": "dacl", "table": "1", "method": "DACL", "dataset": "acdc", "labelled": 3, "metric": "dice"}, 0.9012),
        ({"paper": "dacl", "table": "1", "method": "DHC", "dataset": "btcv", "labelled": 4, "metric": "asd"}, 34.73),
        ({"paper": "dvcl", "table": "1", "method": "DVCL", "dataset": "amos22", "setting": "10%"}, 0.714),
        ({"paper": "dvcl", "table": "2", "method": "CPS baseline", "structure": "gallbladder"}, 0.7512),
    ],
)
def test_numbers_are_the_printed_ones(row, number):
    assert value(**row) == pytest.approx(number)


def test_every_row_is_whole():
    rows = published()
    assert set(rows["paper"]) == set(sources()) >= {"coral", "ideal", "mona", "dacl", "dvcl"}
    key = ["paper", "table", "method", "dataset", "setting", "metric", "structure"]
    assert not rows.duplicated(key).any(), rows[rows.duplicated(key)]
    assert rows["value"].notna().all() and (rows["source"] != "").all()
    overlap = rows["metric"].isin(["dice", "jaccard"])
    assert rows[overlap]["value"].between(0, 1, inclusive="neither").all()
    assert (rows[~overlap]["value"] > 0).all() and set(rows[~overlap]["metric"]) == {"asd", "hd"}


def test_a_row_says_why_it_is_not_ours_to_compare_with():
    rows = published()
    assert (rows["reason"] != "").all()  # as of now no paper's protocol is ours; a rerun of theirs would be
    assert published(paper="coral")["reason"].str.contains("pooled").all()
    assert published(paper="coral")["reason"].str.contains("held-out fold").all()
    assert published(paper="mona", metric="asd")["reason"].str.contains("voxels").all()
    assert not published(paper="mona", metric="dice")["reason"].str.contains("voxels").any()
    assert published(paper="coral", dataset="chd")["note"].str.contains("row order").all()
    copied = published(paper="ideal", table="2")
    assert copied[copied["method"] == "PCL"]["note"].str.contains("pooled").all()
    assert list(copied[copied["method"] == "PCL"]["value"]) == [0.671, 0.850, 0.885]


def test_rows_are_flagged_where_dice_and_jaccard_contradict_each_other():
    """Jaccard is convex in Dice, so a mean Jaccard is at least D / (2 - D); half a last digit is allowed for."""
    rows = published()
    key = ["paper", "table", "method", "dataset", "setting", "structure"]
    both = rows[rows["metric"].isin(["dice", "jaccard"])].pivot(index=key, columns="metric", values="value").dropna()
    dice = both["dice"] - 5e-5
    impossible = both[both["jaccard"] + 5e-5 < dice / (2 - dice)].index
    flagged = rows[rows["note"].str.contains("impossible")].set_index(key).index
    assert set(impossible) == set(flagged) and len(impossible) == 12
    assert {(i[0], i[3]) for i in impossible} == {("dacl", "acdc")}


def test_filters_name_what_there_is():
    assert set(published(paper="mona", dataset="lits")["table"]) == {"I", "IV"}
    with pytest.raises(ValueError, match=r"'unet'.*'coral'"):
        published(paper="unet")
    with pytest.raises(ValueError, match="dataset 'lits'.*acdc"):
        published(paper="coral", dataset="lits")


def test_a_table_is_a_copy():
    rows = published()
    rows.loc[:, "value"] = 0
    assert (published()["value"] > 0).all()


def test_sources_say_what_is_needed_to_read_a_table():
    for source in sources().values():
        assert source.keys() == {"title", "venue", "url", "percent", "std_over", "protocol", "reasons"}
        for rule in source["reasons"]:
            assert rule.keys() <= {"table", "dataset", "metric", "setting", "because"}
