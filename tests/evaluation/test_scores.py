"""Other people's scores: any CSV or Parquet, matched by name, refused with a reason; subgroups."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from chexlib.app.cli import main
from chexlib.data.nih import load_radiographs
from chexlib.data.splits import LISTS, read_list
from chexlib.errors import DataError
from chexlib.evaluation.auroc import bootstrap_auroc, judge, subgroup_auroc
from chexlib.evaluation.scores import evaluate, judged_in, read_scores, where_from
from chexlib.findings import FINDINGS
from chexlib.phantom.write import write_phantom


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Labels of 400 phantom images, and no image: what somebody has who judges scores."""
    root = write_phantom(
        tmp_path_factory.mktemp("data") / "made",
        n_images=400,
        size=32,
        min_prevalence=0.1,
        workers=1,
    )
    labels = tmp_path_factory.mktemp("labels")
    for path in root.glob("*.*"):
        (labels / path.name).write_bytes(path.read_bytes())
    assert not list(labels.rglob("*.png"))
    return labels


@pytest.fixture(scope="module")
def radiographs(folder):
    return load_radiographs(folder, require_images=False)


@pytest.fixture
def table(radiographs):
    """Scores of all images of the official test list, in an order of its own, a column per finding."""
    listed = radiographs.listed
    rows = listed[listed["image"].isin(read_list(radiographs.root / "test_list.txt"))].sample(
        frac=1, random_state=0
    )
    rng = np.random.default_rng(0)
    scores = pd.DataFrame(
        rng.normal(size=(len(rows), 14)) + rows[list(FINDINGS)].to_numpy(), columns=list(FINDINGS)
    )
    return pd.concat([rows["image"].reset_index(drop=True), scores], axis=1)


def call(*words):
    return CliRunner().invoke(main, ["evaluate", *map(str, words)])


def expected_of(table, radiographs):
    rows = radiographs.listed.set_index("image").loc[table["image"]]
    return bootstrap_auroc(
        rows[list(FINDINGS)].to_numpy(),
        table[list(FINDINGS)].to_numpy(),
        rows["patient"].to_numpy(),
    )


@pytest.mark.parametrize(
    "form", ["csv", "parquet", "prefix", "columns in another order", "paths", "our own predictions"]
)
def test_scores_are_judged_whatever_their_form(form, table, radiographs, folder, tmp_path):
    expected, file = expected_of(table, radiographs), tmp_path / "scores.csv"
    if form == "prefix":
        table = table.rename(columns={f: f"Prob_{f.replace('_', ' ')}" for f in FINDINGS})
    elif form == "columns in another order":
        table = table[["image", *sorted(FINDINGS, reverse=True)]].assign(model="theirs")
    elif form == "paths":
        table = table.assign(image="images_001/images/" + table["image"]).rename(
            columns={"image": "Image Index"}
        )
    elif form == "our own predictions":
        table = table.rename(columns={f: f"score_{f}" for f in FINDINGS}).assign(
            part="test", patient=1
        )
        table[[f"label_{f}" for f in FINDINGS]] = 1  # the folder's labels count, not the file's
        table = pd.concat([table, table.assign(part="validation")])
    if form in ("parquet", "our own predictions"):
        file = tmp_path / "scores.parquet"
        table.to_parquet(file, index=False)
    else:
        table.to_csv(file, index=False)
    pd.testing.assert_frame_equal(evaluate(file, folder)["auroc"], expected)


def test_the_command_prints_the_list_its_digest_and_every_finding(
    table, folder, radiographs, tmp_path
):
    table.to_csv(tmp_path / "scores.csv", index=False)
    answer = call(tmp_path / "scores.csv", "--data", folder)
    assert answer.exit_code == 0, answer.output
    digest = where_from(read_scores(tmp_path / "scores.csv", radiographs), radiographs)["digest"]
    first = answer.stdout.splitlines()[0]
    assert (
        digest in first
        and f"{len(table)} of the {len(table)} images of the official test list" in first
    )
    assert "TRAINING" not in first
    for finding, row in expected_of(table, radiographs).iterrows():
        assert finding in answer.stdout and f"{row['auroc']:.3f}" in answer.stdout


def test_the_command_as_json_compares_two_files(table, folder, tmp_path):
    other = table.copy()
    other[list(FINDINGS)] += np.random.default_rng(1).normal(size=(len(table), 14))
    table.to_csv(tmp_path / "one.csv", index=False)
    other.sample(frac=1, random_state=2).to_parquet(tmp_path / "other.parquet", index=False)
    answer = call(
        tmp_path / "one.csv", "--data", folder, "--against", tmp_path / "other.parquet", "--json"
    )
    found = json.loads(answer.stdout)
    mean = found["difference"]["mean"]
    assert (
        mean["auroc"] == found["auroc"]["mean"]["auroc"] > mean["other"]
        and 0 <= mean["p_holm"] <= 1
    )
    assert len(found["auroc"]) == len(found["difference"]) == 15 and found["split"][
        "images"
    ] == len(table)


def test_images_of_the_training_list_are_told(table, radiographs, folder, tmp_path):
    seen = read_list(folder / "train_val_list.txt")[:7]
    table.loc[:6, "image"] = seen
    table.to_csv(tmp_path / "scores.csv", index=False)
    assert (
        "7 of the official TRAINING list" in call(tmp_path / "scores.csv", "--data", folder).stdout
    )


@pytest.mark.parametrize(
    ("fault", "naming"),
    [
        (lambda t: t.assign(image="x" + t["image"]), ["none of", "'x0000", "'image'"]),
        (lambda t: t.assign(image=np.arange(len(t))), ["none of", "'0'"]),
        (lambda t: t.assign(image=[t["image"][1], *t["image"][1:]]), ["1 images occur twice"]),
        (lambda t: t.drop(columns="Hernia"), ["'Hernia'", "one column per finding"]),
        (lambda t: t.rename(columns={"Mass": "score_Mass"}), ["'Mass'"]),
        (lambda t: t.rename(columns={"Pleural_Thickening": "Mass "}), ["'Pleural_Thickening'"]),
        (lambda t: t.assign(**{"Pleural Thickening": 0}), ["two columns for one finding"]),
        (
            lambda t: t.assign(**{f"b_{f}": 0 for f in FINDINGS}),
            ["several columns per finding", "'b_'"],
        ),
        (
            lambda t: t.set_axis(["image", *map(str, range(14))], axis=1),
            ["no column of a finding", "Atelectasis"],
        ),
        (
            lambda t: t.assign(Mass=["high", *t["Mass"][1:]]),
            ["1 scores are missing, or are not numbers"],
        ),
        (lambda t: t.assign(part="validation"), ["'test'", "'validation'"]),
        (lambda t: t[:0], ["no rows"]),
    ],
)
def test_scores_that_cannot_be_judged_are_refused_by_name(fault, naming, table, folder, tmp_path):
    fault(table).to_csv(tmp_path / "scores.csv", index=False)
    answer = call(tmp_path / "scores.csv", "--data", folder)
    assert answer.exit_code == 2 and answer.stdout == ""
    for word in ["scores.csv", *naming]:
        assert word in answer.stderr


def test_a_parquet_file_that_unpacks_to_more_than_scores_take_is_refused_unread(
    table, radiographs, tmp_path, monkeypatch
):
    rows = pa.array(np.zeros(10**7 + 1, np.int8))
    pq.write_table(pa.table({"image": rows}), tmp_path / "rows.parquet", compression="zstd")
    text = pa.DictionaryArray.from_arrays(rows[: 10**4], ["x" * 10**6])  # 10 GB, in some kB
    pq.write_table(pa.table({"image": text}), tmp_path / "text.parquet", compression="zstd")
    assert all(file.stat().st_size < 10**5 for file in tmp_path.glob("*.parquet"))
    table.to_parquet(tmp_path / "scores.parquet")
    monkeypatch.setattr(pd, "read_parquet", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read: it has 10,000,001 rows"):
        read_scores(tmp_path / "rows.parquet", radiographs)
    with pytest.raises(DataError, match="column 'image' has a text of 1,000,000 characters"):
        read_scores(tmp_path / "text.parquet", radiographs)
    monkeypatch.setattr("chexlib.evaluation.scores.MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"scores\.parquet cannot be read: it has .* when unpacked"):
        read_scores(tmp_path / "scores.parquet", radiographs)


@pytest.mark.parametrize("column", ["image", "part", "Mass", "note"])
def test_lists_in_a_column_are_no_names_and_no_scores(column, table, radiographs, tmp_path):
    path = tmp_path / "scores.parquet"
    table.assign(**{column: [[1, 2]] * len(table)}).to_parquet(path)
    if column == "note":
        assert len(read_scores(path, radiographs)) == len(table)
        return
    with pytest.raises(DataError, match=r"scores\.parquet"):
        read_scores(path, radiographs)


def test_an_error_of_arrow_in_several_lines_is_told_in_one(table, radiographs, tmp_path):
    path = tmp_path / "scores.parquet"
    table.to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])  # the header of the first page
    with pytest.raises(DataError, match=r"scores\.parquet cannot be read") as error:
        read_scores(path, radiographs)
    assert "\n" in str(error.value.__cause__) and "\n" not in str(error.value)


def labels_of(table, radiographs):
    return (
        radiographs.listed.set_index("image")
        .loc[table["image"], list(FINDINGS)]
        .reset_index(drop=True)
    )


def corner(table):
    """The first row's first three cells."""
    mask = np.zeros(table.shape, bool)
    mask[0, :3] = True
    return mask


FORMS_OF_LABELS = {
    "labels under the names, scores with a suffix": lambda t, y: pd.concat(
        [t.add_suffix("_pred"), y], axis=1
    ),
    "labels whole, one score misspelt": lambda t, y: pd.concat(
        [t.rename(columns={"Pleural_Thickening": "Pleural_thickening"}), y.add_prefix("gt_")],
        axis=1,
    ),
    "labels in per cent": lambda t, y: 100 * y,
    "labels smoothed": lambda t, y: 0.05 + 0.9 * y,
    "labels inverted": lambda t, y: 1 - y,
    "labels but for one image of three findings": lambda t, y: y.mask(corner(y), 1 - y),
    "the labels of one finding": lambda t, y: t.assign(Infiltration=y["Infiltration"]),
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("form", FORMS_OF_LABELS)
def test_labels_are_not_judged_as_scores(form, kind, table, radiographs, folder, tmp_path):
    """Scores here are noise: they were judged to have a mean AUROC of 1.000."""
    rng = np.random.default_rng(5)
    noise = pd.DataFrame(rng.random((len(table), 14)), columns=list(FINDINGS))
    made = FORMS_OF_LABELS[form](noise, labels_of(table, radiographs))
    made.insert(0, "image", table["image"])
    file = tmp_path / f"scores.{kind}"
    made.to_csv(file, index=False) if kind == "csv" else made.to_parquet(file, index=False)
    answer = call(file, "--data", folder)
    assert (
        answer.exit_code == 2
        and "are the labels, not scores" in answer.stderr
        and not answer.stdout
    )
    also = {"suffix": ["'Hernia_pred'"], "misspelt": ["'Pleural_thickening'", "'Hernia'"]}
    assert all(name in answer.stderr for name in also.get(form.split()[-1], ()))


@pytest.mark.parametrize("form", ["decisions", "nothing found", "three right"])
def test_scores_of_two_values_or_one_are_judged(form, table, radiographs, folder, tmp_path):
    labels, rng = labels_of(table, radiographs), np.random.default_rng(0)
    wrong = rng.random(labels.shape) < 0.1
    scores = table[list(FINDINGS)]
    decided = {
        "decisions": labels.mask(wrong, 1 - labels),
        "nothing found": 0 * labels,
        "three right": scores.mask(corner(scores), labels),
    }[form]
    made = pd.concat([table["image"], decided], axis=1)
    made.to_csv(tmp_path / "scores.csv", index=False)
    pd.testing.assert_frame_equal(
        evaluate(tmp_path / "scores.csv", folder)["auroc"], expected_of(made, radiographs)
    )


def test_columns_that_look_like_findings_and_are_not_used_are_named(
    table, radiographs, folder, tmp_path, caplog
):
    like = {"old_Mass": 0.5, "PNEUMOTHORAX (raw)": 0.5, "Cardiomegly": 0.5}
    made = table.assign(**like, model="theirs", age=50, **{"No Finding": 1})
    made.to_csv(tmp_path / "scores.csv", index=False)
    answer = call(tmp_path / "scores.csv", "--data", folder)
    assert answer.exit_code == 0
    assert caplog.text.endswith("are not used: 'old_Mass', 'PNEUMOTHORAX (raw)', 'Cardiomegly'.\n")
    found = json.loads(call(tmp_path / "scores.csv", "--data", folder, "--json").stdout)
    assert found["left_out"] == {"images": 0, "first": [], "columns": list(like)}
    pd.testing.assert_frame_equal(
        evaluate(tmp_path / "scores.csv", folder)["auroc"], expected_of(table, radiographs)
    )


def test_rows_whose_image_is_unknown_or_not_named_are_left_out(
    table, radiographs, folder, tmp_path, caplog
):
    means = table[list(FINDINGS)].mean().to_frame().T
    strangers = table[:3].assign(image=["x.png", "y.png", "x.png"], Mass="?")
    pd.concat([table, strangers, means]).to_csv(tmp_path / "scores.csv", index=False)
    with open(tmp_path / "scores.csv", "a") as file:
        file.write("," * 14 + "\n")  # a blank row is none
    answer = call(tmp_path / "scores.csv", "--data", folder)
    assert answer.exit_code == 0 and f"4 of {len(table) + 4} rows are left out" in caplog.text
    assert "'x.png'" in caplog.text and "'(no name)'" in caplog.text
    found = evaluate(tmp_path / "scores.csv", folder)
    assert found["left_out"] == {
        "images": 4,
        "first": ["x.png", "y.png", "x.png", ""],
        "columns": [],
    }
    pd.testing.assert_frame_equal(found["auroc"], expected_of(table, radiographs))


@pytest.mark.parametrize(
    ("separator", "decimal"), [(";", ","), (";", "."), ("\t", ","), (",", ",")]
)
def test_a_spreadsheets_separators_and_decimal_commas_are_read(
    separator, decimal, table, radiographs, folder, tmp_path
):
    table.to_csv(tmp_path / "scores.csv", index=False, sep=separator, decimal=decimal)
    pd.testing.assert_frame_equal(
        evaluate(tmp_path / "scores.csv", folder)["auroc"], expected_of(table, radiographs)
    )


@pytest.mark.parametrize(
    "fault", ["a comma after each row", "a header without the first name", "a column twice"]
)
def test_rows_that_do_not_fit_their_header_are_refused(fault, table, folder, tmp_path):
    header, *rows = table.to_csv(index=False).splitlines()
    if fault == "a comma after each row":
        rows = [row + "," for row in rows]
    else:
        header = (
            header.removeprefix("image,")
            if fault == "a header without the first name"
            else header + ",Mass"
        )
        rows = rows if "first" in fault else [row + ",0.5" for row in rows]
    (tmp_path / "scores.csv").write_text("\n".join([header, *rows]))
    answer = call(tmp_path / "scores.csv", "--data", folder)
    assert (
        answer.exit_code == 2 and "scores.csv" in answer.stderr and "Traceback" not in answer.output
    )


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_image_names_are_text_however_much_they_look_like_numbers(kind, table, folder, tmp_path):
    """Names of digits alone, of more than float64 tells apart, and with zeros in front."""
    root = tmp_path / "labels"
    root.mkdir()
    lines = (folder / "Data_Entry_2017_v2020.csv").read_text().splitlines()
    names = [f"{10**17 + i // 2}" if i % 2 else f"{i:05d}" for i in range(len(lines) - 1)]
    rows = [f"{name},{line.partition(',')[2]}" for name, line in zip(names, lines[1:], strict=True)]
    (root / "Data_Entry_2017.csv").write_text("\n".join([lines[0], *rows]))
    radiographs = load_radiographs(root, require_images=False)
    scores = np.random.default_rng(0).random((len(names), 14))
    made = pd.concat(
        [pd.DataFrame({"image": names}), pd.DataFrame(scores, columns=list(FINDINGS))], axis=1
    )
    file = tmp_path / f"scores.{kind}"
    made.to_csv(file, index=False) if kind == "csv" else made.to_parquet(file, index=False)
    found = read_scores(file, radiographs)
    assert found["image"].tolist() == names
    np.testing.assert_allclose(found[[f"score_{f}" for f in FINDINGS]], scores, rtol=1e-14)


def write_lists(folder, root, form):
    """The folder's label file and lists, each line of the lists in another form."""
    root.mkdir()
    for path in folder.glob("*.*"):
        text = path.read_text()
        if path.suffix == ".txt":
            text = "".join(form.format(name) + "\n" for name in text.split())
        (root / path.name).write_text(text)
    return root


@pytest.mark.parametrize(
    "form",
    [
        "{} 0 0 1 0 0 0 0 0 0 0 0 0 0 0",
        "images_001/images/{}",
        "images\\{}\t0\t1",
        "{},Mass|Nodule,0,58",
        '"{}"',
        "{};0;1",
    ],
)
def test_lists_with_labels_or_folders_beside_the_names_are_understood(
    form, table, folder, tmp_path
):
    root = write_lists(folder, tmp_path / "other", form)
    table.loc[:6, "image"] = read_list(folder / "train_val_list.txt")[:7]
    table.to_csv(tmp_path / "scores.csv", index=False)
    plain, other = (
        call(tmp_path / "scores.csv", "--data", data).stdout.splitlines()[0]
        for data in (folder, root)
    )
    assert "7 of the official TRAINING list" in plain and other == plain


def test_official_lists_of_which_no_name_is_known_are_refused(table, folder, tmp_path):
    root = write_lists(folder, tmp_path / "other", "x{}")
    table.to_csv(tmp_path / "scores.csv", index=False)
    answer = call(tmp_path / "scores.csv", "--data", root)
    assert (
        answer.exit_code == 2
        and "train_val_list.txt: none of its" in answer.stderr
        and "'x0000" in answer.stderr
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [("none.csv", None), ("bad.parquet", b"PAR1?"), ("bad.csv", b"\xff\x00\n\xfe")],
)
def test_files_that_cannot_be_read_are_refused(name, content, folder, tmp_path):
    if content:
        (tmp_path / name).write_bytes(content)
    answer = call(tmp_path / name, "--data", folder)
    assert answer.exit_code == 2 and name in answer.stderr and "Traceback" not in answer.output


def test_trained_notebooks_of_a_run_are_found_if_data_and_split_are_the_same(tmp_path):
    def leave(name, *, data="here", digest="aa", whole=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(
            json.dumps({"data": data, "split": {"digest": digest}})
        )
        if whole:
            (tmp_path / name / "config.json").write_text(json.dumps({"seed": 3}))
            of_findings = [f"{kind}_{f}" for kind in ("label", "score") for f in FINDINGS]
            table = pd.DataFrame({"image": [name], "patient": "1", "part": "test"})
            table[of_findings] = 0.0
            table.to_parquet(tmp_path / name / "predictions.parquet")

    leave("02_no_training", whole=False)
    leave("03_first")
    leave("04_other_data", data="there")
    leave("05_other_split", digest="bb")
    leave("06_second")
    found = judged_in(tmp_path, "here")
    assert list(found) == ["03_first", "06_second"] and judged_in(None, "here") == {}
    assert found["06_second"]["predictions"]["image"].tolist() == ["06_second"]
    assert found["03_first"]["config"] == {"seed": 3} and found["03_first"]["split"] == {
        "digest": "aa"
    }


# --- subgroups


@pytest.fixture
def predictions(radiographs):
    """Scores of all listed images, better than chance, beside their labels."""
    rows = radiographs.listed
    labels = rows[list(FINDINGS)].to_numpy(float, copy=True)
    frame = rows[["image", "patient"]].assign(part="test")
    frame[[f"label_{f}" for f in FINDINGS]] = labels
    frame[[f"score_{f}" for f in FINDINGS]] = np.random.default_rng(0).normal(labels)
    return frame


def test_the_mean_of_a_group_is_that_of_its_own_images(predictions, radiographs):
    sex = radiographs.listed["sex"]
    found = subgroup_auroc(predictions, sex)
    assert list(found.index) == ["F", "M"] and found["images"].sum() == len(predictions)
    assert found["patients"].sum() == predictions["patient"].nunique()
    women, men = (judge(predictions[(sex == name).to_numpy()])[:-1] for name in "FM")
    both = women["low"].notna() & men["low"].notna()
    assert (found["findings"] == both.sum()).all() and both.any()
    for name, own in (("F", women), ("M", men)):
        assert found.loc[name, "auroc"] == pytest.approx(own.loc[both, "auroc"].mean(), abs=1e-12)
        assert found.loc[name, "low"] < found.loc[name, "auroc"] < found.loc[name, "high"]
    # Where one group is all images, it is the mean of the table, interval and all.
    table = judge(predictions)
    (whole,) = subgroup_auroc(predictions, ["all"] * len(predictions)).to_dict("records")
    if table[:-1]["low"].notna().all():
        expected = table.loc["mean", ["auroc", "low", "high"]]
        assert [whole[x] for x in ("auroc", "low", "high")] == pytest.approx(expected, abs=1e-12)


def test_the_means_of_groups_are_over_the_same_findings(predictions, radiographs):
    women = (radiographs.listed["sex"] == "F").to_numpy()
    label, score = f"label_{FINDINGS[3]}", f"score_{FINDINGS[3]}"
    predictions.loc[women, label] = 0  # no woman has it: the men's mean must do without it too
    predictions[score] = predictions[label]
    found = subgroup_auroc(predictions, np.where(women, "F", "M"))
    men = judge(predictions[~women])
    assert men.loc[FINDINGS[3], "auroc"] == 1 and found.loc["M", "findings"] <= 13
    assert found.loc["M", "auroc"] < men["auroc"].iloc[:14].mean()


def test_a_group_that_is_too_small_does_not_speak_and_the_others_do(predictions):
    few = predictions["patient"].isin(["1", "2", "3"]).to_numpy()
    found = subgroup_auroc(predictions, np.where(few, "few", "others"))
    assert found.loc["few", ["auroc", "low", "high"]].isna().all()
    assert found.loc["few", "findings"] == 0 < found.loc["others", "findings"]
    assert found.loc["others", ["auroc", "low", "high"]].notna().all()


def test_labels_of_the_test_part_alone_are_judged_beside_both_official_lists(
    table, folder, tmp_path
):
    radiographs = load_radiographs(folder, require_images=False)
    tested = read_list(folder / LISTS[1])
    part = tmp_path / "part"
    part.mkdir()
    for name in LISTS:
        (part / name).write_text((folder / name).read_text())
    (csv,) = folder.glob("Data_Entry*.csv")
    head, *rows = csv.read_text().splitlines()
    (part / csv.name).write_text(
        "\n".join([head, *(row for row in rows if row.split(",")[0] in tested)]) + "\n"
    )
    subset = load_radiographs(part, require_images=False)
    assert 0 < len(subset.listed) < len(radiographs.listed)
    table[table["image"].isin(tested)].to_csv(tmp_path / "scores.csv", index=False)
    found = evaluate(tmp_path / "scores.csv", part)["split"]
    assert found["name"].endswith(f"of the {len(tested):,} images of the official test list")
