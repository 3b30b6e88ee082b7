"""Figures say what they show: units on the axes, every finding there, numbers as given, nothing
left open.
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from chexlib import figures
from chexlib.evaluation.auroc import bootstrap_auroc
from chexlib.findings import FINDINGS
from chexlib.ledger.published import beside_published, published_auroc, published_splits


def words(figure):
    """All text of a figure."""
    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def judged():
    generator = np.random.default_rng(0)
    labels = (generator.random((60, 14)) < 0.3).astype(int)
    labels[:, 3] = 0
    return bootstrap_auroc(labels, generator.random((60, 14)), np.arange(60), resamples=20)


def test_every_figure_is_closed_and_has_units_on_its_axes():
    drawn = [
        figures.data_parallel_step(3),
        figures.batch_norm_statistics(2),
        figures.ring_allreduce(3),
        figures.history(
            [{"epoch": e, "loss": 1 / (e + 1), "val_loss": 1.0, "val_auroc": 0.6} for e in range(3)]
        ),
        figures.auroc_bars(judged(), title="a title"),
        figures.leaking_split(),
    ]
    assert not plt.get_fignums()
    for figure in drawn:
        axes = [ax for ax in figure.axes if ax.axison]
        assert not axes or any(ax.get_xlabel() or ax.get_ylabel() for ax in axes)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_picture_of_a_step_shows_each_rank_and_one_mean_for_all(ranks):
    shown = words(figures.data_parallel_step(ranks))
    counts = {part: shown.count(part) for part in ("own gradient", "equal weights", "mean of all")}
    assert counts == {"own gradient": ranks, "equal weights": ranks, "mean of all": 1}
    assert f"rank {ranks - 1}" in shown and f"rank {ranks}" not in shown


def test_the_picture_of_norms_gives_a_letter_to_the_images_that_share_statistics():
    panels = figures.batch_norm_statistics(2, images=4).axes
    letters = ["".join(text.get_text() for text in ax.texts) for ax in panels]
    assert letters == ["AAAABBBB", "AAAAAAAA", "AABBCCDD", "ABCDEFGH"]


def test_radiographs_are_grey_with_boxes_and_their_names():
    images = [np.full((32, 32), value, np.uint8) for value in (0, 128, 255)]
    box = pd.DataFrame(
        [("Mass", 0.1, 0.2, 0.3, 0.4)], columns=["finding", "x", "y", "width", "height"]
    )
    figure = figures.radiographs(
        images, ["one", "two", "three"], boxes=[box, box[:0], box[:0]], columns=2
    )
    shown = [ax.images[0] for ax in figure.axes if ax.images]
    assert len(shown) == 3 and all(image.get_clim() == (0, 255) for image in shown)
    assert all(image.get_cmap().name == "gray" for image in shown)
    assert {"one", "two", "three", "Mass"} <= set(words(figure).split())


def test_auroc_bars_name_every_finding_with_its_positives_and_the_undefined_one():
    table = judged()
    text = words(figures.auroc_bars(table))
    for finding in FINDINGS:
        assert f"{finding.replace('_', ' ')} ({table.loc[finding, 'positives']})" in text
    assert "undefined (0 positives)" in text and "chance" in text


def test_the_split_that_leaks_marks_whoever_is_in_both_parts_and_the_other_nobody():
    leaking, honest = figures.leaking_split().axes
    for ax, marked in ((leaking, True), (honest, False)):
        told = [(round(t.get_position()[1]), t.get_text()) for t in ax.texts]
        parts = {y: {part for at, part in told if at == y and part != "in both"} for y, _ in told}
        both = {y for y, own in parts.items() if len(own) > 1}
        assert both == {y for y, part in told if part == "in both"} and bool(both) == marked
    counts = [[t.get_text() for t in ax.texts].count("test") for ax in (leaking, honest)]
    assert counts[0] and abs(counts[0] - counts[1]) <= 1


def test_a_forest_says_where_there_is_no_interval_and_fills_what_is_claimed():
    table = pd.DataFrame(
        {
            "difference": [0.1, 0.2, np.nan],
            "low": [0.05, np.nan, np.nan],
            "high": [0.15, np.nan, np.nan],
        }
    )
    table.index = ["Mass", "Pleural_Thickening", "Hernia"]
    style = {"xlabel": "difference of AUROC", "line": 0}
    figure = figures.forest(table, "difference", filled=table["low"] > 0, **style)
    text = words(figure)
    assert (
        "Pleural Thickening" in text
        and "0.200, too small to speak" in text
        and not plt.get_fignums()
    )
    assert text.count("too small") == 2 and figure.axes[0].get_xlabel() == "difference of AUROC"
    filled, open_ = figure.axes[0].lines[1:3]
    assert filled.get_ydata() == [0] and len(open_.get_ydata()) == 0
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # the first row is on top
    findings = figures.forest(judged(), "auroc", **style).axes[0].get_yticklabels()
    assert findings[0].get_text() == "mean"
    assert findings[1].get_text() == judged()["auroc"].iloc[:14].idxmax().replace("_", " ")


def test_ours_stand_beside_published_numbers_with_their_splits_and_the_leaking_one_is_marked():
    split = {"name": "patient", "digest": "0123456789ab", "images": {"test": 60}}
    table = beside_published({"03": {"auroc": judged().to_dict("index"), "split": split}})
    assert table.columns[0] == ("03", "patient split 0123456789ab, 60 test images")
    assert [source for source, _ in table.columns if "LEAKS" in source] == ["Dell DenseNet (LEAKS)"]
    assert dict(table.columns[1:]) == {
        f"{s} (LEAKS)" if s == "Dell DenseNet" else s: how for s, how in published_splits().items()
    }
    assert table.loc["Hernia", ("CheXNet", published_splits()["CheXNet"])] == 0.9164
    assert table.iloc[14, 0] == pytest.approx(judged()["auroc"].iloc[:14].mean())


def test_published_numbers_are_those_of_their_sources():
    table = published_auroc()
    assert list(table.columns) == list(published_splits()) and list(table.index) == [
        *FINDINGS,
        "mean",
    ]
    assert (
        table.loc["Hernia", "CheXNet"] == 0.9164
        and table.loc["Pneumonia", "Dell DenseNet"] == 0.8328
    )
    assert table.loc["mean", "CheXNet"] == pytest.approx(0.8414, abs=1e-4)
    assert "leaks" in published_splits()["Dell DenseNet"]
