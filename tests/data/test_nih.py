"""The NIH layout is read right; each known trap of it has an answer, or a message that names the
value.
"""

import io
import logging
import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chexlib.data.nih import Radiographs, check_images, load_radiographs, look_up, read_image
from chexlib.data.splits import audit, image_split, make_split, patient_split
from chexlib.errors import ConfigError, DataError
from chexlib.findings import FINDINGS

SHARED = Path(__file__).parents[3] / "shared"
needs_real = pytest.mark.skipif(
    not (SHARED / "nih-256").is_dir(), reason="no real radiographs beside the project"
)
CSV = "Data_Entry_2017_v2020.csv"


def edit(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


# ---- both editions, real and small


@pytest.mark.parametrize("edition", ["2017", "v2020"])
def test_either_edition_gives_the_same_tables(tiny_nih, edition):
    radiographs = load_radiographs(tiny_nih(edition=edition))
    reference = load_radiographs(tiny_nih("reference"))
    pd.testing.assert_frame_equal(radiographs.listed, reference.listed)
    pd.testing.assert_frame_equal(radiographs.boxes, reference.boxes)
    table = radiographs.table
    assert len(radiographs) == len(table) == 24
    metadata = ["image", "path", "patient", "follow_up", "age", "sex", "view"]
    assert list(table.columns) == [*metadata, *FINDINGS]
    assert list(radiographs.listed.columns) == [c for c in table.columns if c != "path"]
    assert table["image"].is_monotonic_increasing and list(table.index) == list(range(24))
    row = table[table["image"] == "00000001_002.png"].iloc[0]
    assert (row["patient"], row["follow_up"], row["age"], row["sex"], row["view"]) == (
        "1",
        2,
        43.0,
        "F",
        "PA",
    )
    assert [f for f in FINDINGS if row[f]] == ["Cardiomegaly", "Effusion"]
    assert table[list(FINDINGS)].dtypes.eq(np.int8).all() and table["age"].dtype == float
    assert all(os.path.isabs(path) and os.path.isfile(path) for path in table["path"])


def test_the_table_is_sorted_by_image_whatever_the_order_of_the_csv(tiny_nih):
    root = tiny_nih()
    header, *rows = (root / CSV).read_text().splitlines()
    (root / CSV).write_text("\n".join([header, *rows[::-1]]))
    reference = load_radiographs(tiny_nih("reference"))
    shuffled = load_radiographs(root)
    pd.testing.assert_frame_equal(
        shuffled.table.drop(columns="path"), reference.table.drop(columns="path")
    )
    assert [Path(path).name for path in shuffled.table["path"]] == shuffled.table["image"].tolist()


def test_labels_are_float32_in_the_order_of_findings(tiny_nih):
    radiographs = load_radiographs(tiny_nih())
    labels = radiographs.labels
    assert labels.dtype == np.float32 and labels.shape == (24, 14)
    hand = dict(
        Hernia=3, Infiltration=3, Cardiomegaly=3, Effusion=3, Pleural_Thickening=1, Atelectasis=2
    )
    assert {finding: labels[:, FINDINGS.index(finding)].sum() for finding in hand} == hand


def test_sex_and_view_are_of_two_values_each_and_what_else_is_there_is_unknown(tiny_nih, caplog):
    root = tiny_nih()
    table = pd.read_csv(root / CSV, dtype=str)
    table.loc[:5, "Patient Gender"] = ["m", " F ", "Female", "<b>M</b>", "", "U"]
    table.loc[:3, "View Position"] = ["pa", "AP", "<script>alert(1)</script>", None]
    table.to_csv(root / CSV, index=False)
    listed = load_radiographs(root).listed
    assert listed["sex"][:6].tolist() == ["M", "F", "F", "", "", ""]
    assert listed["view"][:4].tolist() == ["PA", "AP", "", ""]
    assert "sex: 2 rows are set to unknown: '<b>M</b>', 'U' (accepted: F, M)" in caplog.text
    assert "view: 1 rows are set to unknown" in caplog.text and "(accepted: AP, PA)" in caplog.text


@needs_real
@pytest.mark.parametrize(
    ("folder", "images", "boxes"), [("nih-64", 998, 9), ("nih-256", 437, 7), ("nih-1024", 23, 4)]
)
def test_real_folders_are_read(folder, images, boxes, caplog):
    caplog.set_level(logging.INFO)
    radiographs = load_radiographs(SHARED / folder)
    assert (len(radiographs), len(radiographs.listed), len(radiographs.boxes)) == (
        images,
        112120,
        boxes,
    )
    assert f"{images} of 112120 images present" in caplog.text
    assert set(radiographs.table["sex"]) == {"M", "F"} and set(radiographs.table["view"]) <= {
        "PA",
        "AP",
    }
    assert radiographs.listed["patient"].nunique() == 30805
    assert (
        radiographs.boxes[["x", "y", "width", "height"]]
        .apply(lambda values: values.between(0, 1))
        .all(axis=None)
    )
    pixels = read_image(radiographs.table["path"].iloc[-1])
    side = int(folder.split("-")[1])
    assert pixels.shape == (side, side) and pixels.dtype == np.uint8 and pixels.std() > 10
    assert len(check_images(radiographs.select(radiographs.table["image"][:20]))) == 20


@needs_real
def test_label_counts_are_those_of_the_release():
    listed = load_radiographs(SHARED / "nih-1024").listed
    raw = pd.read_csv(SHARED / "nih-1024" / CSV)["Finding Labels"]
    expected = raw.str.get_dummies("|")  # an independent, slower parser
    assert (listed[list(FINDINGS)].to_numpy() == expected[list(FINDINGS)].to_numpy()).all()
    published = {
        "Hernia": 227,
        "Pneumonia": 1431,
        "Infiltration": 19894,
        "Atelectasis": 11559,
    }  # data card
    assert {finding: listed[finding].sum() for finding in published} == published


def test_v2020_is_preferred_and_logged_when_both_editions_lie_in_the_folder(tiny_nih, caplog):
    caplog.set_level(logging.INFO)
    root, old = tiny_nih(), tiny_nih("old", edition="2017")
    shutil.copy(old / "Data_Entry_2017.csv", root)
    edit(root / CSV, "Mass|Nodule", "Hernia")
    assert load_radiographs(root).listed["Mass"].sum() == 0
    assert "several label files" in caplog.text and f"reading {CSV}" in caplog.text


# ---- ages, boxes


def test_ages_are_years_and_impossible_ones_unknown(tiny_nih, caplog):
    root = tiny_nih(edition="2017")
    path = root / "Data_Entry_2017.csv"
    for old, new in {
        ",041Y,": ",411Y,",
        ",044Y,": ",006M,",
        ",043Y,": ",073D,",
        ",045Y,": ",,",
        ",051Y,": ",old,",
    }.items():
        edit(path, old, new)
    ages = load_radiographs(root).table.set_index("image")["age"]
    assert np.isnan(ages["00000001_000.png"]) and "'411Y'" in caplog.text and "'old'" in caplog.text
    assert ages["00000004_000.png"] == 0.5
    assert ages["00000003_000.png"] == pytest.approx(73 / 365.25)
    assert np.isnan(ages["00000005_000.png"])
    assert ages["00000010_000.png"] == 50


@pytest.mark.parametrize("edition", ["2017", "v2020"])
def test_boxes_are_fractions_with_canonical_findings_of_present_images(tiny_nih, edition):
    root = tiny_nih(edition=edition)
    boxes = load_radiographs(root).boxes
    assert list(boxes.columns) == ["image", "finding", "x", "y", "width", "height"]
    assert boxes.to_numpy().tolist() == [
        ["00000005_001.png", "Infiltration", 0.25, 0.5, 0.125, 0.0625],
        ["00000001_000.png", "Cardiomegaly", 0.1, 0.0, 0.5, 1.0],
    ]
    (root / "images_001/images/00000005_001.png").unlink()
    assert load_radiographs(root).boxes["image"].tolist() == ["00000001_000.png"]
    (root / "BBox_List_2017.csv").unlink()
    empty = load_radiographs(root).boxes
    assert empty.empty and list(empty.columns) == list(boxes.columns) and empty["x"].dtype == float


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [("Infiltrate", "Infiltrated", "'Infiltrated'"), (",256,", ",left,", "'left'")],
)
def test_a_bad_box_is_named(tiny_nih, old, new, named):
    root = tiny_nih()
    edit(root / "BBox_List_2017.csv", old, new)
    with pytest.raises(DataError, match=named):
        load_radiographs(root)


# ---- where images lie


@pytest.mark.parametrize(
    "images", ["images", "images/batch/deep", "images_012/images", "images_x/00/01"]
)
def test_images_are_found_under_any_images_folder(tiny_nih, images):
    root = tiny_nih(images=images)
    (root / images / "._00000001_000.png").write_bytes(b"left by macOS")
    assert len(load_radiographs(root)) == 24


def test_images_are_found_through_links_and_odd_folder_names(tiny_nih, tmp_path):
    root = tiny_nih("odd [1] *", images="elsewhere")
    (root / "images").symlink_to(root / "elsewhere", target_is_directory=True)
    assert len(load_radiographs(root)) == 24


def test_a_partial_download_keeps_rows_of_present_images_and_counts_strangers(tiny_nih, caplog):
    caplog.set_level(logging.INFO)
    root = tiny_nih()
    folder = root / "images_001/images"
    (folder / "00000001_001.png").unlink()
    (folder / "00000002_000.png").rename(folder / "stranger.png")
    radiographs = load_radiographs(root)
    assert (len(radiographs), len(radiographs.listed)) == (22, 24)
    assert not radiographs.table["image"].isin(["00000001_001.png", "00000002_000.png"]).any()
    assert "22 of 24 images present" in caplog.text
    assert "1 images have no row" in caplog.text and "'stranger.png'" in caplog.text


def test_one_name_in_two_image_folders_is_refused(tiny_nih):
    root = tiny_nih()
    (root / "images_002").mkdir()
    shutil.copy(root / "images_001/images/00000003_001.png", root / "images_002")
    with pytest.raises(
        DataError, match=r"1 images are in two folders.*00000003_001\.png.*images_002"
    ) as caught:
        load_radiographs(root)
    assert "Remove" in str(caught.value)


# ---- folders and tables that cannot be used


def test_a_folder_that_does_not_exist_is_named_with_the_next_step(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*python -m chexlib phantom DIR"):
        load_radiographs(tmp_path / "nowhere")
    (tmp_path / "file.csv").write_text("x")
    with pytest.raises(DataError, match=r"file\.csv.*python -m chexlib phantom DIR"):
        load_radiographs(tmp_path / "file.csv")


def test_a_folder_without_csv_is_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"no label file .*Data_Entry_2017_v2020\.csv or Data_Entry_2017\.csv.*phantom DIR",
    ):
        load_radiographs(tmp_path)


def test_kaggles_sample_is_read_with_its_own_label_file_and_found_one_folder_below(tiny_nih):
    root = tiny_nih(edition="2017", images="images")
    whole = load_radiographs(root)
    (root / "Data_Entry_2017.csv").rename(root / "sample_labels.csv")
    sample = load_radiographs(root)
    assert sample.table.equals(whole.table) and sample.table["age"].iloc[0] == 41
    # The official lists name images that a sample's labels do not have.
    for name in ("train_val_list.txt", "test_list.txt"):
        file = root / name
        file.write_text(f"00099999_{len(name):03d}.png\n{file.read_text()}")
    assert make_split(sample, kind="official").parts == make_split(whole, kind="official").parts
    with pytest.raises(DataError, match=re.escape(f"Did you mean {root}?")):
        load_radiographs(root.parent)


def test_a_missing_column_is_named_with_those_present(tiny_nih):
    root = tiny_nih()
    edit(root / CSV, "Finding Labels", "Findings")
    with pytest.raises(
        DataError, match=r"no column 'Finding Labels' \(columns: Image Index, Findings, Follow-up #"
    ):
        load_radiographs(root)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (
            "Mass|Nodule",
            "Mass|Fracture",
            "unknown findings: 'Fracture'. Correct them.*No Finding, Atelectasis",
        ),
        ("Pneumothorax", "", "unknown findings: ''"),
        ("00000010_001.png", "00000001_000.png", "occur twice: '00000001_000.png'"),
        ("00000010_001.png", "", "blank or occur twice: ''"),
        (
            ",1,10,",
            ",1,,",
            "the patient is missing, or is a number .* in 1 of 24 rows: ''",
        ),
        (
            ",1,10,",
            ",1,1.23457E+17,",
            r"spreadsheet has rounded, in 1 of 24 rows: '1\.23457E\+17'.*as NIH released it",
        ),
        (
            ",1,10,",
            ",1,12345678901234568.0,",
            r"spreadsheet has rounded, in 1 of 24 rows: '12345678901234568\.0'",
        ),
        (
            ",1,10,",
            ",one,10,",
            "follow_up: whole numbers are expected, and 1 of 24 rows have others: 'one'",
        ),
        (",0,10,", ",0.5,10,", "follow_up: whole numbers are expected.*: '0.5'"),
    ],
)
def test_a_bad_cell_of_the_csv_is_named(tiny_nih, old, new, named):
    root = tiny_nih()
    edit(root / CSV, old, new)
    with pytest.raises(DataError, match=named):
        load_radiographs(root)


@pytest.mark.parametrize("first", [10**16, 2**53, 10**38])
def test_patients_of_any_number_of_digits_are_told_apart(tiny_nih, first):
    """PadChest's have up to 39; as float64 many of them are one."""
    root, plain = tiny_nih(), load_radiographs(tiny_nih("plain")).table
    lines = [line.split(",") for line in (root / CSV).read_text().splitlines()]
    for cells in lines[1:]:
        cells[3] = str(first + int(cells[3]))
    (root / CSV).write_text("\n".join(map(",".join, lines)))
    radiographs = load_radiographs(root)
    assert radiographs.table["patient"].tolist() == [
        str(first + int(patient)) for patient in plain["patient"]
    ]
    for split in (patient_split(radiographs, seed=1), make_split(radiographs, kind="official")):
        found = audit(split, radiographs)
        assert sum(found.patients.values()) == 10 and not found.leaks
    assert audit(image_split(radiographs), radiographs, allow_leak=True).leaks


def test_patients_may_be_any_text(tiny_nih, caplog):
    root = tiny_nih()
    edit(root / CSV, ",1,10,", ",1, P-10/ä ,")  # with blanks around it
    edit(root / CSV, ",0,9,", ",0,9.0,")  # by a program that took it for a measurement
    edit(root / CSV, ",1,6,", ",1,12e34,")  # no number with an exponent, which have a sign
    patients = load_radiographs(root).table.set_index("image")["patient"]
    assert patients["00000010_001.png"] == "P-10/ä" and patients["00000010_000.png"] == "10"
    assert patients["00000009_000.png"] == patients["00000009_001.png"] == "9"
    assert patients["00000006_001.png"] == "12e34"
    assert not caplog.records


def test_patients_that_differ_by_zeros_in_front_are_different_and_named(tiny_nih, caplog):
    root = tiny_nih()
    edit(root / CSV, ",1,10,", ",1,0010,")
    assert load_radiographs(root).table["patient"].nunique() == 11
    assert "leading zeros" in caplog.text and "'10'" in caplog.text and "'0010'" in caplog.text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("OriginalImage[Width", "Patient Sex"),
        ("OriginalImage[Width", " Patient ID "),
        ("Height]", "Image Index"),
        ("y]", "Finding Labels"),
    ],
)
def test_two_columns_for_one_thing_are_refused(tiny_nih, old, new):
    root = tiny_nih()
    edit(root / CSV, old, new)
    with pytest.raises(
        DataError, match=f"several columns for one thing: .*{new.strip()}.*Keep one"
    ):
        load_radiographs(root)


def test_columns_that_are_not_read_may_have_one_name_or_none(tiny_nih):
    root = tiny_nih()
    edit(root / CSV, "OriginalImage[Width,Height]", ",")
    edit(root / CSV, "OriginalImagePixelSpacing[x,y]", "more,more")
    assert len(load_radiographs(root)) == 24


def test_a_row_given_twice_with_the_same_labels_is_refused(tiny_nih):
    root = tiny_nih()
    lines = (root / CSV).read_text().splitlines()
    (root / CSV).write_text("\n".join([*lines, lines[5]]))
    with pytest.raises(DataError, match=r"occur twice: '00000003_000\.png'"):
        load_radiographs(root)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00broken", b'"Image Index\n'])
def test_a_csv_that_is_none_is_refused(tiny_nih, content):
    root = tiny_nih()
    (root / CSV).write_bytes(content)
    with pytest.raises(DataError, match=CSV):
        load_radiographs(root)


def test_a_csv_with_no_rows_is_refused(tiny_nih):
    root = tiny_nih()
    (root / CSV).write_text((root / CSV).read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="has no rows"):
        load_radiographs(root)


def test_a_csv_saved_by_a_spreadsheet_is_read(tiny_nih):
    root = tiny_nih()
    text = (root / CSV).read_text().replace("\n", "\r\n").replace("Image Index,", "Image Index ,")
    (root / CSV).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(load_radiographs(root)) == 24


def test_zero_images_are_refused_unless_only_labels_are_wanted(tiny_nih):
    root = tiny_nih()
    shutil.rmtree(root / "images_001")
    with pytest.raises(
        DataError, match=r"lists 24 images, but none .*images\*.*python -m chexlib phantom DIR"
    ):
        load_radiographs(root)
    labels_only = load_radiographs(root, require_images=False)
    assert (
        len(labels_only) == 0
        and len(labels_only.listed) == 24
        and labels_only.labels.shape == (0, 14)
    )


# ---- sampling and selecting


def test_a_sample_holds_whole_patients_but_for_the_last(tiny_nih):
    root = tiny_nih()
    full = load_radiographs(root)
    sizes = full.table["patient"].value_counts()
    samples = {n: load_radiographs(root, max_images=n, seed=3) for n in (1, 7, 12, 23, 24, 100)}
    for n, sample in samples.items():
        assert len(sample) == min(n, 24)
        kept = sample.table["patient"].value_counts()
        assert (kept < sizes[kept.index]).sum() <= 1
        assert sample.table["image"].is_monotonic_increasing and len(sample.listed) == 24
        assert sample.boxes["image"].isin(sample.table["image"]).all()
    assert set(samples[7].table["image"]) < set(samples[12].table["image"])
    again = load_radiographs(root, max_images=7, seed=3)
    pd.testing.assert_frame_equal(again.table, samples[7].table)
    others = {
        tuple(load_radiographs(root, max_images=7, seed=seed).table["image"]) for seed in range(5)
    }
    assert len(others) > 1
    with pytest.raises(ConfigError, match="max_images=-1"):
        load_radiographs(root, max_images=-1)


def test_select_keeps_the_order_of_the_table_and_refuses_strangers(tiny_nih):
    radiographs = load_radiographs(tiny_nih())
    chosen = radiographs.select(name for name in ("00000005_001.png", "00000001_001.png"))
    assert isinstance(chosen, Radiographs)
    assert chosen.table["image"].tolist() == ["00000001_001.png", "00000005_001.png"]
    assert chosen.boxes["image"].tolist() == ["00000005_001.png"] and len(chosen.listed) == 24
    with pytest.raises(DataError, match=r"'nobody\.png'"):
        radiographs.select(["00000001_001.png", "nobody.png"])


def test_a_notebook_shows_counts_and_escapes_the_folder_name(tiny_nih):
    page = load_radiographs(tiny_nih("a<b>&c"))._repr_html_()
    assert "24 images of 24 listed, 10 patients" in page and "a&lt;b&gt;&amp;c" in page
    assert all(finding in page for finding in FINDINGS)


# ---- pixels


def levels(side=16, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side), np.uint8)


GREY = levels()
OPAQUE = np.full_like(GREY, 255)
PALETTE = Image.fromarray(GREY, "P")
PALETTE.putpalette([value for i in range(256) for value in (i, i, i)])
WITH_TRANSPARENCY = PALETTE.copy()
WITH_TRANSPARENCY.info["transparency"] = bytes(range(256))
MODES = {
    "L": Image.fromarray(GREY),
    "RGB": Image.fromarray(np.dstack([GREY] * 3)),
    "RGBA": Image.fromarray(np.dstack([GREY] * 3 + [OPAQUE])),
    "RGBA with odd alpha": Image.fromarray(np.dstack([GREY] * 3 + [levels(seed=1)])),
    "LA": Image.fromarray(np.dstack([GREY, OPAQUE])),
    "P": PALETTE,
    "P with transparency": WITH_TRANSPARENCY,
    "I;16": Image.fromarray(GREY.astype(np.uint16) * 257),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_png_gives_the_same_grey_levels(mode, tmp_path):
    MODES[mode].save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png")
    assert pixels.dtype == np.uint8 and pixels.shape == (16, 16)
    np.testing.assert_array_equal(pixels, GREY)


def test_one_bit_images_are_black_and_white(tmp_path):
    Image.fromarray(GREY > 127).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), np.where(GREY > 127, 255, 0))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    pixels = read_image(tmp_path / "deep.png")
    np.testing.assert_array_equal(pixels, np.rint(deep / 257))
    assert (pixels.min(), pixels.max()) == (0, 255) and len(np.unique(pixels)) == 256


@pytest.mark.parametrize("bits", range(8, 17))
def test_films_of_fewer_bits_in_sixteen_have_white_where_their_bits_have_it(bits, tmp_path):
    white = 2**bits - 1
    stored = np.random.default_rng(bits).integers(0, white + 1, (40, 50))
    stored[0, :2] = 0, white
    Image.fromarray(stored.astype(np.uint16)).save(tmp_path / "film.png")
    found = read_image(tmp_path / "film.png").astype(float)
    assert np.abs(found - stored * 255.0 / white).max() <= 0.5
    assert (found.min(), found.max()) == (0, 255)


def test_a_black_film_of_sixteen_bits_is_black(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "film.png")
    assert not read_image(tmp_path / "film.png").any()


def test_an_image_keeps_its_height_and_width(tmp_path):
    Image.fromarray(levels(20)[:7]).save(tmp_path / "wide.png")
    assert read_image(str(tmp_path / "wide.png")).shape == (7, 20)


@needs_real
def test_real_rgba_radiographs_equal_their_red_channel():
    files = sorted((SHARED / "nih-1024").rglob("*.png"))
    rgba = [path for path in files if Image.open(path).mode == "RGBA"]
    assert rgba, "the shared folder is said to hold RGBA files"
    for path in rgba[:2]:
        np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path))[:, :, 0])


def test_a_png_cut_anywhere_is_whole_or_refused_by_name(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "PNG")
    data, path = buffer.getvalue(), tmp_path / "cut.png"
    refused = 0
    for length in range(len(data)):
        path.write_bytes(data[:length])
        try:
            np.testing.assert_array_equal(read_image(path), GREY)
        except DataError as error:
            refused += 1
            assert "cut.png" in str(error)
    assert refused > len(data) - 30


def bomb() -> bytes:
    """A small file that says it is 20000 x 20000."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def test_files_that_are_no_image_are_refused_by_name(tmp_path):
    path = tmp_path / "00000009_009.png"
    cases = {"it is empty": b"", "it is neither": b"Not Found\n" * 20, "400000000 pixels": bomb()}
    for reason, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=rf"00000009_009\.png cannot be read as PNG or JPEG: .*{reason}"
        ):
            read_image(path)
    with pytest.raises(DataError, match=r"nobody\.png"):
        read_image(tmp_path / "nobody.png")
    with pytest.raises(DataError, match=str(tmp_path.name)):
        read_image(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_pil_only_warns_of_is_refused(tmp_path):
    Image.new("1", (10000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(
        DataError, match=r"huge\.png.*10000 x 9000 px, over the limit of 67,108,864 px"
    ):
        read_image(tmp_path / "huge.png")


def test_broken_images_are_named_or_dropped(tiny_nih, caplog):
    root = tiny_nih()
    whole = load_radiographs(root)
    assert len(check_images(whole)) == 24
    (root / "images_001/images/00000003_001.png").write_bytes(b"")
    half = root / "images_001/images/00000009_002.png"
    half.write_bytes(half.read_bytes()[:200])
    with pytest.raises(
        DataError, match=r"2 of 24 images are broken.*00000003_001\.png.*00000009_002\.png"
    ) as caught:
        check_images(whole)
    assert "skip_broken=True" in str(caught.value)
    with pytest.raises(DataError) as caught:
        read_image(half)  # as `predict` does, which has no such setting
    assert "skip_broken" not in str(caught.value)
    kept = check_images(whole, skip_broken=True)
    assert (
        len(kept) == 22
        and not kept.table["image"].isin(["00000003_001.png", "00000009_002.png"]).any()
    )
    assert "left out: 2 of 24" in caplog.text
    for path in whole.table["path"]:
        Path(path).write_bytes(b"")
    with pytest.raises(DataError, match="24 of 24 images are broken"):
        check_images(whole, skip_broken=True)


def test_images_that_cannot_be_had_in_a_training_folder_are_told(tiny_nih, caplog, monkeypatch):
    root = tiny_nih()
    images = root / "images_001" / "images"
    (images / "00000001_000.png").unlink()
    (images / "00000001_000.png").symlink_to("gone.png")
    (root / "images_002").symlink_to("not-mounted")
    (root / "images_003").mkdir()
    scandir = os.scandir

    def guarded(path="."):  # root may list anything
        if str(path).endswith("images_003"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert len(load_radiographs(root)) == 23
    (told,) = (text for text in caplog.messages if "cannot be read" in text)
    assert "3 files or folders" in told and "00000001_000.png: a link to nowhere" in told
    assert "images_002: No such file" in told and "images_003: Permission denied" in told


def test_images_are_those_that_the_label_file_names_whatever_their_ending(tiny_nih, caplog):
    root = tiny_nih()
    images = root / "images_001" / "images"
    labels = root / "Data_Entry_2017_v2020.csv"
    labels.write_text(labels.read_text().replace("00000001_000.png", "00000001_000.JPG"))
    Image.open(images / "00000001_000.png").save(images / "00000001_000.JPG", "JPEG")
    (images / "00000001_000.png").unlink()
    (images / "00000002_000.png").rename(images / "00000002_000.tif")
    (root / "images_002").symlink_to("images_001")  # each folder is entered once
    loaded = load_radiographs(root)
    assert len(loaded) == 23 and "00000001_000.JPG" in loaded.table["image"].tolist()
    (told,) = (text for text in caplog.messages if "no row" in text)
    assert "1 images have no row" in told and "00000002_000.tif" in told


def test_a_box_file_without_a_header_line_keeps_its_first_box(tiny_nih, caplog):
    root = tiny_nih()
    whole = load_radiographs(root).boxes
    assert len(whole) == 2 and not caplog.messages
    boxes = root / "BBox_List_2017.csv"
    boxes.write_text(boxes.read_text().split("\n", 1)[1])
    pd.testing.assert_frame_equal(load_radiographs(root).boxes, whole)
    (told,) = caplog.messages
    assert "BBox_List_2017.csv has no header:" in told


def test_grey_levels_of_a_large_image_are_looked_up_as_those_of_a_small_one():
    places = np.random.default_rng(0).integers(0, 1000, (3001, 3000), np.uint16)
    levels = np.random.default_rng(1).integers(0, 256, 1000, np.uint8)
    found = look_up(levels, places)
    assert found.dtype == np.uint8 and np.array_equal(found, levels[places])
