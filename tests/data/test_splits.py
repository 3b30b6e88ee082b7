"""No patient in two parts, every part alike in findings, and an audit that finds what leaks."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chexlib.data import splits
from chexlib.data.nih import Radiographs, load_radiographs
from chexlib.data.splits import (
    LISTS,
    PARTS,
    Split,
    audit,
    image_split,
    make_split,
    official_split,
    patient_split,
    read_list,
)
from chexlib.errors import ConfigError, DataError
from chexlib.findings import FINDINGS

SHARED = Path(__file__).parents[3] / "shared"
needs_real = pytest.mark.skipif(
    not (SHARED / "nih-256").is_dir(), reason="no real radiographs beside the project"
)


@functools.cache
def real(folder: str) -> Radiographs:
    return load_radiographs(SHARED / folder)


def made_up(n_patients: int, *, seed: int = 0, root: Path = Path("made-up")) -> Radiographs:
    """Label tables alone: patients with 1 to 12 images; findings that are rarer the later they
    come.
    """
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(1, n_patients + 1), rng.geometric(0.35, n_patients).clip(max=12))
    chance = np.geomspace(0.25, 0.01, len(FINDINGS)) * rng.lognormal(0, 0.7, (n_patients + 1, 1))
    labels = (rng.random((len(patient), len(FINDINGS))) < chance[patient]).astype(np.int8)
    names = [f"{p:08d}_{i:05d}.png" for i, p in enumerate(patient)]
    table = pd.DataFrame({"image": names, "patient": patient})
    table = pd.concat([table, pd.DataFrame(labels, columns=list(FINDINGS))], axis=1)
    return Radiographs(
        root, table.assign(path=table["image"]), table, pd.DataFrame(columns=["image"])
    )


def unevenness(radiographs: Radiographs, split: Split, fractions) -> float:
    """Mean over findings and parts of |positives - fraction x all positives| / all positives."""
    rows = radiographs.table.set_index("image")
    total = rows[list(FINDINGS)].sum()
    found = pd.DataFrame(
        {part: rows.loc[list(names), list(FINDINGS)].sum() for part, names in split.parts.items()}
    )
    wanted = np.outer(total, fractions)
    return float((np.abs(found.to_numpy() - wanted) / total.to_numpy()[:, None]).mean())


def random_patient_split(radiographs: Radiographs, fractions, seed: int) -> Split:
    """The reference: shuffled patients, cut where the images reach each fraction."""
    table = radiographs.table
    ids = np.random.default_rng(seed).permutation(table["patient"].unique())
    images = table["patient"].value_counts()[ids].cumsum() / len(table)
    part = pd.Series(np.searchsorted(np.cumsum(fractions)[:2], images.to_numpy() - 1e-9), index=ids)
    of_row = part[table["patient"]].to_numpy()
    return Split(
        "random", seed, {name: tuple(table["image"][of_row == i]) for i, name in enumerate(PARTS)}
    )


# ---- by patient


@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.2), (0.5, 0.25, 0.25)])
def test_every_part_gets_its_fraction_of_images_and_findings(fractions, monkeypatch):
    monkeypatch.setattr(splits, "FRACTIONS", fractions)
    radiographs = made_up(600)
    split = patient_split(radiographs, seed=1)
    result = audit(split, radiographs)
    assert not result.leaks and list(split.parts) == list(PARTS)
    assert sorted(sum(split.parts.values(), ())) == sorted(radiographs.table["image"])
    n = len(radiographs)
    for part, fraction in zip(PARTS, fractions, strict=True):
        assert result.images[part] / n == pytest.approx(fraction, abs=0.01)
        assert result.positives[part].sum() == pytest.approx(
            fraction * result.positives.to_numpy().sum(), rel=0.05
        )


def test_stratified_parts_are_more_even_than_random_patients():
    fractions = (0.7, 0.1, 0.2)
    ours, theirs = [], []
    for seed in range(8):
        radiographs = made_up(150, seed=seed)
        ours.append(unevenness(radiographs, patient_split(radiographs, seed=seed), fractions))
        random = [
            unevenness(radiographs, random_patient_split(radiographs, fractions, s), fractions)
            for s in range(10)
        ]
        theirs.append(np.mean(random))
    assert np.mean(ours) < 0.6 * np.mean(theirs)
    assert all(a < b for a, b in zip(ours, theirs, strict=True))


def test_large_families_of_images_do_not_gather_in_one_part():
    sizes = {part: [] for part in PARTS}
    radiographs = made_up(400)
    per_patient = radiographs.table["patient"].map(radiographs.table["patient"].value_counts())
    by_image = pd.Series(per_patient.to_numpy(), index=radiographs.table["image"])
    for seed in range(10):
        for part, names in patient_split(radiographs, seed=seed).parts.items():
            sizes[part].append(by_image[list(names)].mean())
    means = [np.mean(values) for values in sizes.values()]
    assert max(means) < 1.15 * min(means)


@pytest.mark.parametrize("split", [patient_split, image_split, make_split])
def test_a_seed_decides_the_split(split):
    radiographs = made_up(80)
    first, again, other = (split(radiographs, seed=seed) for seed in (1, 1, 2))
    assert first.parts == again.parts and first.digest == again.digest
    assert first.digest != other.digest and first.seed == 1


@pytest.mark.parametrize("n_patients", [3, 4, 5])
def test_no_part_is_empty_from_three_patients_on(n_patients):
    for seed in range(20):
        radiographs = made_up(n_patients, seed=seed)
        for split in (
            patient_split(radiographs, seed=seed),
            image_split(made_up(n_patients, seed=1), seed=seed),
        ):
            assert all(split.parts.values())
        assert not audit(patient_split(radiographs, seed=seed), radiographs).leaks


def test_too_few_patients_or_images_are_refused_with_their_number():
    with pytest.raises(DataError, match=r"at least 3 patients.*has 2\..*phantom DIR"):
        patient_split(made_up(2))
    one = made_up(1)
    one = dataclasses.replace(one, table=one.table[:1])
    with pytest.raises(DataError, match=r"at least 3 images; made-up has 1\."):
        image_split(one)


def test_an_image_split_leaks_and_the_audit_says_so():
    radiographs = made_up(100)
    split = image_split(radiographs)
    n = len(radiographs)
    assert [len(split.images(part)) for part in PARTS] == pytest.approx(
        [0.7 * n, 0.1 * n, 0.2 * n], abs=1
    )
    assert len(set(sum(split.parts.values(), ()))) == n
    with pytest.raises(
        DataError, match=r"leaks.*train and test share \d+ patients.*allow_leak=True"
    ):
        audit(split, radiographs)


# ---- the official split


def test_the_official_test_list_is_the_test_part(tiny_nih):
    radiographs = load_radiographs(tiny_nih())
    split = official_split(radiographs)
    assert split.images("test") == read_list(radiographs.root / "test_list.txt")
    assert len(split.images("train")) + len(split.images("validation")) == 15
    assert not audit(split, radiographs).leaks
    assert split.name == "official" and make_split(radiographs, kind="official").name == "official"


def test_the_official_split_keeps_only_present_images(tiny_nih):
    root = tiny_nih()
    for name in ("00000003_002.png", "00000001_001.png"):
        (root / "images_001/images" / name).unlink()
    radiographs = load_radiographs(root)
    split = official_split(radiographs)
    assert sorted(sum(split.parts.values(), ())) == radiographs.table["image"].tolist()
    assert len(split.images("test")) == 8


def test_present_images_in_neither_list_are_left_out_and_counted(tiny_nih, caplog):
    root = tiny_nih()
    names = read_list(root / "train_val_list.txt")
    (root / "train_val_list.txt").write_text("\n".join(names[3:]))
    split = official_split(load_radiographs(root))
    assert not set(names[:3]) & set(sum(split.parts.values(), ()))
    assert "3 images are left out, as neither official list has them" in caplog.text


def test_an_empty_official_part_is_named_with_the_way_out(tiny_nih):
    root = tiny_nih()
    radiographs = load_radiographs(root)
    training = radiographs.select(read_list(root / "train_val_list.txt"))
    with pytest.raises(DataError, match=r"puts none into test\. Split by patient"):
        official_split(training)
    with pytest.raises(DataError, match="puts none into train and validation"):
        official_split(radiographs.select(read_list(root / "test_list.txt")))
    one_patient = radiographs.select(["00000001_000.png", "00000001_001.png", "00000003_000.png"])
    with pytest.raises(DataError, match="puts none into validation"):
        official_split(one_patient)
    assert make_split(training).name == "patient"


def test_a_missing_list_is_named(tiny_nih):
    root = tiny_nih()
    (root / "test_list.txt").unlink()
    radiographs = load_radiographs(root)
    with pytest.raises(DataError, match=r"test_list\.txt cannot be read"):
        official_split(radiographs)
    assert make_split(radiographs).name == "patient"


def test_an_image_in_both_official_lists_is_named(tiny_nih):
    root = tiny_nih()
    with (root / "test_list.txt").open("a") as file:
        file.write("00000001_001.png\n")
    with pytest.raises(DataError, match=r"share images: '00000001_001\.png'"):
        official_split(load_radiographs(root))


def rewrite(path, form):
    path.write_text("".join(form.format(name) + "\n" for name in path.read_text().split()))


def test_official_lists_longer_than_the_labels_split_as_if_they_were_not(tiny_nih):
    root, plain = tiny_nih(), load_radiographs(tiny_nih("plain"))
    for name in LISTS:
        rewrite(root / name, "{0}\n9{0}")
    split = make_split(load_radiographs(root), kind="auto", seed=2)
    assert split.name == "official" and split.digest == official_split(plain, seed=2).digest


@pytest.mark.parametrize(
    "form", ["{} 0 1 0 0", "images/{}", "C:\\nih\\{}", "{}\t1", '"{}",Mass,58', "{} "]
)
def test_lists_with_labels_or_folders_beside_the_names_split_officially(tiny_nih, form):
    root, plain = tiny_nih(), load_radiographs(tiny_nih("plain"))
    for name in LISTS:
        rewrite(root / name, form)
    split = make_split(load_radiographs(root), seed=2)
    assert split.name == "official" and split.digest == official_split(plain, seed=2).digest


@pytest.mark.parametrize("name", ["train_val_list.txt", "test_list.txt"])
def test_a_list_of_which_no_name_is_known_is_an_error_not_a_split_by_patient(tiny_nih, name):
    root = tiny_nih()
    rewrite(root / name, "x{}")
    radiographs = load_radiographs(root)
    for kind in ("auto", "official"):
        with pytest.raises(
            DataError, match=rf"{name}: none of its \d+ images is in the label file.*'x0000"
        ):
            make_split(radiographs, kind=kind)
    assert make_split(radiographs, kind="patient").name == "patient"


def test_official_lists_that_are_not_used_are_told_aloud(tiny_nih, caplog):
    root = tiny_nih()
    training = load_radiographs(root)
    training = training.select(read_list(root / "train_val_list.txt"))
    assert make_split(training).name == "patient"
    assert "splitting by patient, not officially" in caplog.text
    for name in LISTS:
        (root / name).write_text("")
    caplog.clear()
    assert make_split(load_radiographs(root)).name == "patient"
    assert "not officially" not in caplog.text  # told only where one asks for it


def test_auto_takes_the_official_split_only_if_its_test_part_can_be_scored(tiny_nih):
    radiographs = load_radiographs(tiny_nih())
    assert make_split(radiographs).name == "official"
    healthy = radiographs.table[list(FINDINGS)].sum(axis=1) == 0
    test = radiographs.table["image"].isin(read_list(radiographs.root / "test_list.txt"))
    unscored = radiographs.select(radiographs.table["image"][~test | healthy])
    assert official_split(unscored).images("test")
    assert make_split(unscored).name == "patient"


def test_an_unknown_kind_or_part_is_named():
    radiographs = made_up(10)
    with pytest.raises(ConfigError, match=r"'random'.*auto, official, patient, image"):
        make_split(radiographs, kind="random")
    with pytest.raises(ConfigError, match=r"'val'.*train, validation, test"):
        make_split(radiographs).images("val")
    assert make_split(radiographs, kind="image").name == "image"


# ---- the audit


def hand_worked() -> Radiographs:
    """Patients 1 (images a, b, c), 2 (d, e), 3 (f) and 4 (g, h, i, j)."""
    table = pd.DataFrame({"image": list("abcdefghij"), "patient": [1, 1, 1, 2, 2, 3, 4, 4, 4, 4]})
    labels = pd.DataFrame(0, index=table.index, columns=list(FINDINGS), dtype=np.int8)
    labels.loc[[0, 3], "Mass"] = 1
    table = pd.concat([table, labels], axis=1)
    return Radiographs(Path("by-hand"), table[:0].assign(path=""), table, pd.DataFrame())


LEAK = {"train": ("a", "b", "d", "g"), "validation": ("e", "f"), "test": ("c", "h", "i", "j")}


def test_the_audit_counts_shared_patients_and_the_images_they_touch():
    result = audit(LEAK, hand_worked(), allow_leak=True)
    assert result.leaks and result.duplicates == ()
    assert result.images == {"train": 4, "validation": 2, "test": 4}
    assert result.patients == {"train": 3, "validation": 2, "test": 2}
    assert list(result.shared.itertuples(index=False, name=None)) == [
        ("train", "validation", 1, 1, 1),
        ("train", "test", 2, 3, 4),
        ("validation", "test", 0, 0, 0),
    ]
    assert list(result.positives.loc["Mass"]) == [2, 0, 0] and list(
        result.prevalence.loc["Mass"]
    ) == [
        0.5,
        0,
        0,
    ]
    assert tuple(result.prevalence.index) == FINDINGS and tuple(result.prevalence.columns) == PARTS


def test_a_leak_is_refused_with_its_numbers_and_the_way_on(caplog):
    with pytest.raises(DataError) as caught:
        audit(LEAK, hand_worked())
    message = str(caught.value)
    assert (
        "train and validation share 1 patient (1 of 4 images in train, 1 of 2 in validation)"
        in message
    )
    assert "train and test share 2 patients (3 of 4 images in train, 4 of 4 in test)" in message
    assert "validation and test" not in message and "allow_leak=True" in message
    audit(LEAK, hand_worked(), allow_leak=True)
    assert "train and test share 2 patients" in caplog.text


def test_a_clean_split_passes_and_needs_no_images():
    result = audit({"train": list("abc"), "test": iter("defgh")}, hand_worked())
    assert (
        not result.leaks
        and result.images == {"train": 3, "test": 5}
        and result.patients == {"train": 1, "test": 3}
    )
    assert not audit({"test": ["a"]}, hand_worked()).leaks


@pytest.mark.parametrize(
    "parts",
    [{"train": ("a", "b", "f"), "test": ("d", "f")}, {"train": ("a", "f", "f"), "test": ("d",)}],
)
def test_an_image_listed_twice_is_named(parts):
    with pytest.raises(DataError, match="1 images are listed repeatedly: 'f'"):
        audit(parts, hand_worked())
    result = audit(parts, hand_worked(), allow_leak=True)
    assert result.leaks and result.duplicates == ("f",)


def test_names_that_the_labels_do_not_have_are_counted_and_not_checked(caplog):
    result = audit({"train": ["a", "nobody.png", "x.png"], "test": ["d", "e"]}, hand_worked())
    assert result.unknown == {"train": 2, "test": 0} and result.images == {"train": 1, "test": 2}
    assert result.patients == {"train": 1, "test": 1} and not result.leaks
    assert "not checked, as the label file does not have them: 2 in train" in str(result)
    assert "2 of 3 in train" in caplog.text
    leak = audit({"train": ["a", "nobody.png"], "test": ["b"]}, hand_worked(), allow_leak=True)
    assert leak.leaks and "1 in train" in str(leak) and leak.shared["patients"].tolist() == [1]


def test_a_part_of_which_no_name_is_known_is_refused():
    with pytest.raises(
        DataError,
        match=r"test: none of its 1 images is in the label file of by-hand: 'A\.png'.*'a'",
    ):
        audit({"train": ["a", "nobody.png"], "test": ["A.png"]}, hand_worked())


@pytest.mark.parametrize("parts", [{}, {"train": ("a",), "test": ()}])
def test_an_audit_of_nothing_is_no_clean_bill(parts):
    with pytest.raises(DataError, match="A part of the split is empty"):
        audit(parts, hand_worked())


def test_the_digest_depends_on_membership_alone():
    parts = {"train": ("a", "b"), "test": ("d",)}
    split = Split("patient", 0, parts)
    assert len(split.digest) == 12 and int(split.digest, 16) >= 0
    assert split.digest == Split("other", 9, {"test": ("d",), "train": ("b", "a")}).digest
    assert split.digest != Split("patient", 0, {"train": ("a",), "test": ("b", "d")}).digest
    assert audit(split, hand_worked()).digest == split.digest


def test_notebooks_show_split_and_audit():
    split = Split("<patient>", 0, {"train": ("a", "b"), "test": ("d",)})
    page = split._repr_html_()
    assert "&lt;patient&gt; split" in page and split.digest in page and "66.7%" in page
    clean, leak = audit(split, hand_worked()), audit(LEAK, hand_worked(), allow_leak=True)
    assert "No leak" in clean._repr_html_() and "Hernia" in clean._repr_html_()
    assert "LEAK" in leak._repr_html_() and "share 2 patients" in leak._repr_html_()


def test_a_list_is_read_with_any_line_ending_and_without_blank_lines(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\n\r\n b.png \nc.png")
    assert read_list(tmp_path / "list.txt") == ("a.png", "b.png", "c.png")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("list.txt", "nowhere.txt"):
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            read_list(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("my film.png 0 1", "my film.png"),
        ("a,b.png", "a,b.png"),
        ("x.png.png 1", "x.png.png"),
        ("folder/deep/00000001_000 0 0.5 1", "00000001_000"),
        ("'a.JPG', 1", "a.JPG"),
        ("00000001_000;Mass", "00000001_000"),
        ("17", "17"),
    ],
)
def test_the_name_in_a_line_of_a_list_is_found(tmp_path, line, name):
    (tmp_path / "list.txt").write_text(line)
    assert read_list(tmp_path / "list.txt") == (name,)


def test_a_line_that_is_a_name_of_the_labels_is_taken_as_it_is(tmp_path):
    radiographs = hand_worked()
    listed = radiographs.listed.assign(image=["a 1", "b,c", "d;e", *"defghij"])
    (tmp_path / "list.txt").write_text("a 1\nb,c\nd;e\nf 0 1\nnobody\n")
    names = read_list(tmp_path / "list.txt", dataclasses.replace(radiographs, listed=listed))
    assert names == ("a 1", "b,c", "d;e", "f", "nobody")


# ---- real data


@needs_real
@pytest.mark.parametrize("folder", ["nih-64", "nih-256", "nih-1024"])
def test_real_folders_split_without_a_leak(folder):
    radiographs = real(folder)
    for kind in ("auto", "official", "patient"):
        result = audit(make_split(radiographs, kind=kind), radiographs)
        assert not result.leaks and sum(result.images.values()) == len(radiographs)


@needs_real
def test_the_whole_release_splits_at_its_published_sizes():
    radiographs = real("nih-1024")
    whole = dataclasses.replace(radiographs, table=radiographs.listed)
    official = audit(official_split(whole), whole)
    assert official.images["test"] == 25596 and official.patients["test"] == 2797
    assert official.images["train"] + official.images["validation"] == 86524
    assert official.images["validation"] == pytest.approx(0.125 * 86524, abs=10)
    ours = audit(patient_split(whole), whole)
    assert [ours.images[part] / 112120 for part in PARTS] == pytest.approx(
        [0.7, 0.1, 0.2], abs=1e-4
    )
    shares = ours.positives.div(ours.positives.sum(axis=1), axis=0)
    assert np.abs(shares - [0.7, 0.1, 0.2]).to_numpy().max() < 0.005
