"""The ledger has every published figure once, and beside it what a run found: never a figure of
ours that was typed.
"""

import ast
import dataclasses
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from chexlib.evaluation.verdicts import judge
from chexlib.files import ROOT, write_json
from chexlib.findings import FINDINGS
from chexlib.ledger import answers
from chexlib.ledger.answers import VERDICTS, build_ledger, count_verdicts, ledger, verdict
from chexlib.ledger.counterparts import COUNTERPARTS, ITSELF, NOT_RUN
from chexlib.ledger.published import claims, published_auroc, published_collapses, published_ladder
from chexlib.ledger.records import RECORDS, Measured, Results, judged

PUBLISHED = next(
    (
        d / "shared" / "published.md"
        for d in ROOT.parents
        if (d / "shared" / "published.md").exists()
    ),
    None,
)
LATER = ("gain_later", "low_later", "high_later")
RUNGS = [rung for rung in published_ladder() if rung != "+ collapsed ensembles"]
SYSTEMS = ("MareNostrum 4", "Stampede2")
RUNS = [claim.series for claim in claims() if claim.kind == "share of peak"]


def learnt(rng):
    """An AUROC of a network of which something can be concluded."""
    return rng.uniform(0.75, 0.95)


def estimate(rng, name, **more):
    value = rng.uniform(0.3, 0.9)
    return {
        name: value,
        "low": value - rng.uniform(0.01, 0.2),
        "high": value + rng.uniform(0.01, 0.2),
        **more,
    }


def lost(rng):
    own = estimate(rng, "loss")
    return {"loss": own["loss"], "loss_low": own["low"], "loss_high": own["high"]}


def later(rng, *, last):
    """A gain over what the training had an epoch later: not known of its last epoch."""
    own = estimate(rng, "gain")
    return {
        name: None if last else own[old]
        for name, old in zip(LATER, ("gain", "low", "high"), strict=True)
    }


def results(seed, **changes):
    """Results of all notebooks in the form of their `metrics.json`, every figure in them drawn at
    random.
    """
    rng = np.random.default_rng(seed)
    images = {"train": 78468, "validation": 11219, "test": 22433}
    baseline = {
        "data": "nih",
        "split": {"name": "official", "images": images},
        "auroc": {name: estimate(rng, "auroc", positives=40) for name in (*FINDINGS, "mean")},
        "images_per_second": rng.uniform(5, 50),
        **changes,
    }
    batches = ("16", "128", "1024")
    recipes = {
        "ladder": {
            b: {rung: {**estimate(rng, "gain"), "auroc": learnt(rng)} for rung in RUNGS}
            for b in batches
        },
        "auroc_by_batch": {
            b: dict(zip(RUNGS, rng.uniform(size=len(RUNGS)), strict=True)) for b in batches
        },
        "losses": [
            estimate(rng, "loss", rung=rung, batch=batch, updates=updates, baseline=learnt(rng))
            for rung in RUNGS
            for batch, updates in (
                (int(rng.integers(50, 60)), 80 - 2 * seed),
                (128 + seed, 38 + seed),
                (1024 + seed, 19 + seed),
            )
        ],
        "collapse": {
            str(e): {
                **estimate(rng, "gain"),
                "before": rng.uniform(),
                "after": learnt(rng),
                **later(rng, last=e == 6),
            }
            for e in range(1, 7)
        },
        "ensemble": {str(s): {"gain": rng.normal(), "member": learnt(rng)} for s in range(3)},
    }
    rates = ("images_per_second", "efficiency", "solution_hours")
    scaling = {
        "projection": {
            name: {str(n): dict(zip(rates, rng.uniform(size=3), strict=True)) for n in (256, 512)}
            for name in SYSTEMS
        },
        "sensitivity": [
            {"system": name, "further": rng.uniform()}
            | {f"{rate}_{n}": rng.uniform() for rate in rates for n in (256, 512)}
            for name in SYSTEMS
            for _ in range(2)
        ],
        "peak_percent": {name: estimate(rng, "formula") for name in RUNS},
        "solution": {"densenet121": {"seconds": rng.uniform(100, 900)}},
        "ratio": {"ratio": rng.uniform(1, 9)},
    }
    layouts = {f"({seed + 1}, 1)": 9.0, "(1, 1)": 5.0, "(8, 1)": None}
    updates = {
        str(b): {"updates": n, "auroc": learnt(rng), **lost(rng)}
        for b, n in ((16, 60), (64, 10 + seed))
    }
    found = {
        "07": {
            "updates": updates,
            "answers": {
                rule: judged(judge(rng.normal(0.05, 0.01, 5)))
                for rule in ("earlier", "rate", "warm-up")
            },
        },
        "08": {"layouts": layouts},
        "11": scaling,
        "02": {"test_images_seen_in_training": {"image": rng.uniform()}},
        "03": baseline,
        "05": {
            "counts": {
                n: int(rng.integers(2, 10**6)) for n in ("densenet121", "resnet50", "vgg16")
            },
            "answers": {
                question: judged(judge(rng.normal(0.05, 0.01, 5)), scale="10,000 images")
                for question in ("D1", "D2", "swap")
            },
        },
        "06": recipes,
    }
    return {number: Results(number, metrics, {"size": 64}) for number, metrics in found.items()}


def test_no_figure_of_ours_is_typed():
    """Without results there is none; and when all that the notebooks saved is another number, so is
    every figure.
    """
    tables = [ledger(found) for found in ({}, results(1), results(2))]
    nothing, one, other = (table[table["topic"] != "itself"] for table in tables)
    assert nothing[["ours", "low", "high"]].isna().all(axis=None)
    measured = one["ours"].notna()
    assert measured.sum() >= 25 and set(one.index[measured]) == set(
        other.index[other["ours"].notna()]
    )
    for column in ("ours", "low", "high"):
        given = one[column].notna()
        assert (one.loc[given, column] != other.loc[given, column]).all(), column
    fixed = ["published", "unit", "setting", "source", "compared with", "our unit"]
    pd.testing.assert_frame_equal(one[fixed], other[fixed])


def test_every_figure_with_a_counterpart_is_measured_when_its_notebook_has_results():
    table = ledger(results(1))
    assert table.loc[table["notebook"] != "", "ours"].notna().all()
    assert {ITSELF, *table.loc[table["notebook"] != "", "notebook"]} == {
        number for number, _ in COUNTERPARTS.values()
    }


def test_figures_are_those_of_the_metrics_in_the_unit_of_the_ledger():
    found = results(3)
    table, recipes = ledger(found), found["06"].metrics
    row = found["03"].metrics["auroc"]["Mass"]
    assert tuple(table.loc["auroc/jrzech/Mass", ["ours", "low", "high"]]) == (
        row["auroc"],
        row["low"],
        row["high"],
    )
    row = found["03"].metrics["auroc"]["Emphysema"]
    assert table.loc["baseline/emphysema", "low"] == pytest.approx(100 * row["low"])
    row = recipes["ladder"]["16"][
        "+ collapse"
    ]  # the study's ladder ends at its figure for 8K, its smallest batch
    assert tuple(table.loc["ladder/+ collapse", ["ours", "high"]]) == pytest.approx(
        (100 * row["gain"], 100 * row["high"])
    )
    assert table.loc["ladder/+ collapse", "compared with"] == pytest.approx(76.6 - 76.2)
    gains = 100 * np.array([row["gain"] for row in recipes["ensemble"].values()])
    interval = stats.ttest_1samp(gains, 0).confidence_interval()
    told = table.loc["ladder/+ collapsed ensembles", ["ours", "low", "high"]]
    assert tuple(told) == pytest.approx((gains.mean(), *interval))
    told = table.loc["collapse/top-1/2/after", ["ours", "low", "high"]]
    assert tuple(told) == tuple(100 * recipes["collapse"]["2"][name] for name in LATER)
    assert table.loc["collapse/top-1/2/after", "compared with"] == pytest.approx(76.15 - 73.28)
    tuned = found["07"].metrics["updates"]["64"]
    told = table.loc["rules/fine-tuning/loss", ["ours", "low", "high"]]
    assert tuple(told) == (tuned["loss"], tuned["loss_low"], tuned["loss_high"])
    at_64k = next(r for r in recipes["losses"] if r["rung"] == "+ warm-up" and r["updates"] == 22)
    assert (
        table.loc["large batches/Facebook/64K", "ours"] == at_64k["loss"]
    )  # 1,281,167 / 65,536 is 20 updates
    assert table.loc["large batches/Facebook/64K", "compared with"] == pytest.approx(
        100 * (76.2 - 66) / 76.2
    )


def test_a_loss_that_the_studys_recipe_keeps_small_is_contradicted_by_a_large_one():
    for loss, word in ((1.0, "reproduced"), (3.5, "undecided"), (30.0, "contradicted")):
        found = results(1)
        ends = {"low": loss - 0.5, "high": loss + 0.5, "baseline": 0.8}
        found["06"].metrics["losses"] = [
            {"rung": rung, "batch": 1024, "updates": 20, "loss": loss, **ends} for rung in RUNGS
        ]
        table = ledger(found)
        assert table.loc["large batches/the study/64K", "verdict"] == word
        assert (
            table.loc["large batches/Facebook/64K", "verdict"] == "reproduced"
        )  # that such batches lose


def test_what_the_study_of_recipes_has_not_trained_is_said_to_be_missing():
    found = results(1)
    record = ("ladder", "auroc_by_batch", "losses", "collapse", "ensemble")
    found["06"].metrics.update({name: [] if name == "losses" else {} for name in record})
    table = ledger(found)
    asked = table[table["notebook"] == "06"]
    assert len(asked) > 20 and set(asked["why"]) == {NOT_RUN}
    assert set(asked["verdict"]) == {"not comparable"}


def test_a_claim_has_the_verdict_of_its_notebook_or_the_reason_why_it_has_none():
    found = results(1)
    told = {
        "D1": judge([0.05, 0.06, 0.07]),
        "D2": judge([0.001, -0.001, 0.0005, 0.0]),
        "swap": "not comparable: resnet50 reaches 0.600 at batch 32",
    }
    answers = {question: judged(answer) for question, answer in told.items()}
    found["05"].metrics["answers"] = json.loads(json.dumps(answers))
    table = ledger(found)
    words = ("supported", "equivalent", "not comparable")
    for key, word in zip(
        ("DenseNet and ResNet", "DenseNet and VGG", "batch norm"), words, strict=True
    ):
        assert table.loc[f"claims/{key}", "verdict"] == word
    assert table.loc["claims/DenseNet and ResNet", "ours"] == pytest.approx(0.06)
    assert "resnet50 reaches 0.600" in table.loc["claims/batch norm", "why"]
    assert np.isnan(table.loc["claims/batch norm", "ours"])
    found = results(1)
    found["05"].metrics["answers"] = {}
    told = ledger(found).loc["claims/DenseNet and VGG"]
    assert told["verdict"] == "not comparable" and "have not been run" in told["why"]


def test_what_a_source_says_against_its_own_figures_is_contradicted_with_no_run_at_all():
    """By hand: 70 x 256 / (44 x 512) = 79.5 %; 778,715 / 77,871 = 10.0; 100 (1 - 74.9 / 75)."""
    table = ledger({})
    for key, ours in {"512 nodes": 79.545, "an epoch": 10.0, "batch 8192": 0.1333}.items():
        row = table.loc[f"itself/{key}"]
        assert row["verdict"] == "contradicted" and row["ours"] == pytest.approx(ours, rel=1e-3)
    assert table.loc["itself/512 nodes", "high"] < 85  # whatever the minutes were rounded from


def test_what_the_deck_contradicts_itself_and_what_is_its_own_arithmetic_is_not_compared():
    table = ledger(results(1))
    for key, why in {
        "scale/caffe-256/time": "107 images/s a node, where the deck's own node has 74",
        "scale/caffe-512/time": "85 images/s a node",
        "hardware/caffe-448/efficiency": "nothing is measured",
    }.items():
        assert table.loc[key, "verdict"] == "not comparable" and why in table.loc[key, "why"]


def test_one_number_told_twice_has_one_verdict():
    """The model's hours for 90 epochs are its images per second again: only the speed is judged."""
    table = ledger(results(1))
    assert table.loc["scale/tensorflow-256/speed", "verdict"] in (
        "reproduced",
        "contradicted",
        "undecided",
    )
    assert table.loc["scale/tensorflow-256/time", "verdict"] == "not comparable"
    assert "one number is tested once" in table.loc["scale/tensorflow-256/time", "why"]


def test_a_lower_bound_is_no_test_of_a_model_far_above_it_but_can_contradict_one_below():
    for share, word in ((0.993, "not comparable"), (0.8, "contradicted")):
        found = results(1)
        caffe = SYSTEMS[0]
        found["11"].metrics["projection"][caffe]["256"]["images_per_second"] = 1000
        found["11"].metrics["projection"][caffe]["512"]["images_per_second"] = 2000 * share
        for row in found["11"].metrics["sensitivity"]:
            row["further"] = share
        told = ledger(found).loc["scale/caffe-512/efficiency"]
        assert told["verdict"] == word and told["ours"] == pytest.approx(100 * share)
        assert ("no test of a model that says 99 %" in told["why"]) == (word == "not comparable")


def test_no_row_of_a_network_that_learnt_nothing_has_a_verdict():
    found = results(1)
    recipes = found["06"].metrics
    for rungs in recipes["ladder"].values():
        for row in rungs.values():
            row["auroc"] = 0.6
    for row in recipes["losses"]:
        row.update(baseline=0.6, loss=None, low=None, high=None)
    for row in (*recipes["collapse"].values(), *recipes["ensemble"].values()):
        row.update(after=0.6, member=0.6)
    for row in found["07"].metrics["updates"].values():
        row.update(auroc=0.6, loss=None, loss_low=None, loss_high=None)
    reason = judged("nothing was learnt: a mean AUROC of 0.600")
    found["07"].metrics["answers"] = dict.fromkeys(("earlier", "rate", "warm-up"), reason)
    table = ledger(found)
    of_networks = table[table["notebook"].isin(["06", "07"])]
    assert set(of_networks["verdict"]) == {"not comparable"}
    nothing = of_networks["why"].str.startswith("nothing was learnt: a mean AUROC of 0.600")
    assert nothing.sum() >= 15


def test_a_network_that_learnt_nothing_gives_way_to_the_reference_which_is_named():
    run, kept = results(1)["07"], results(2)["07"]
    for row in run.metrics["updates"].values():
        row.update(auroc=0.6, loss=None, loss_low=None, loss_high=None)
    told = ledger(
        {"07": dataclasses.replace(run, reference=dataclasses.replace(kept, origin="kept"))}
    )
    assert told.loc["rules/fine-tuning/loss", "origin"] == "kept"


def test_a_collapse_at_the_end_of_a_training_has_no_verdict_since_nothing_came_later():
    told = ledger(results(1)).loc["collapse/top-1/6/after"]
    assert told["ours"] == pytest.approx(100 * results(1)["06"].metrics["collapse"]["6"]["gain"])
    assert told["verdict"] == "not comparable" and "end of a training" in told["why"]


def test_a_projection_is_labelled_as_the_models_and_not_by_what_its_notebook_trains():
    found = results(1)
    found["11"].params.update(topology="vgg16", size=64)
    table = ledger(found)
    assert table.loc["scale/caffe-256/speed", "scale"] == "the model: ResNet-50 on MareNostrum 4"
    assert (
        table.loc["scale/tensorflow-512/efficiency", "scale"] == "the model: ResNet-50 on Stampede2"
    )
    assert table.loc["densenet/64/time", "scale"] == found["11"].scale != ""


def test_an_interval_that_holds_both_sides_is_undecided():
    assert verdict(Measured(1.0, "", 2.3, -0.1, 2.1, rule="side of 0"))[0] == "undecided"
    assert verdict(Measured(1.0, "", 2, 0.1, 2.1, rule="<"))[0] == "undecided"
    assert verdict(Measured(-1.0, "", 2.3, -1.5, -0.5, rule="side of 0"))[0] == "contradicted"
    assert verdict(Measured(0.8, "", 0.83, 0.75, 0.82))[0] == "contradicted"


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_a_verdict_of_numpy_values_is_that_of_plain_ones():
    """A string times a numpy bool is an error from numpy 2.5 on."""
    for own in (
        Measured(1.0, "", 2, 0.1, 2.1, rule="<"),
        Measured(1.0, "", 2.3, -0.1, 2.1, rule="side of 0"),
    ):
        numbers = {
            name: np.float64(getattr(own, name)) for name in ("value", "published", "low", "high")
        }
        assert verdict(dataclasses.replace(own, **numbers)) == verdict(own)


def test_points_of_a_shorter_training_answer_those_as_far_into_the_studys():
    found = results(1)
    two = {"1": found["06"].metrics["collapse"]["1"], "2": found["06"].metrics["collapse"]["2"]}
    table = ledger({"06": Results("06", {**found["06"].metrics, "collapse": two})})
    told = [
        table.loc[f"collapse/top-1/{point}/before", "ours"] for point in published_collapses().index
    ]
    assert told == [100 * two["1"]["before"]] * 3 + [100 * two["2"]["before"]] * 3


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (Measured(0.8, "", 0.81, 0.75, 0.82), "reproduced"),
        (Measured(0.8, "", 0.83, 0.75, 0.82), "contradicted"),
        (Measured(0.8, "", 0.81), "not comparable"),  # no interval
        (Measured(0.8, "", 0.81, 0.75, 0.82, differs="other images"), "not comparable"),
        (Measured(121, "", 121, tolerance=0), "checked"),
        (Measured(120, "", 121, tolerance=0), "contradicted"),
        (Measured(85.1, "", 90, tolerance=5), "reproduced"),
        (Measured(95.1, "", 90, tolerance=5), "contradicted"),
        (Measured(91, "", 90, 86, 94, tolerance=5), "reproduced"),
        (Measured(70, "", 90, 60, 80, tolerance=5), "contradicted"),
        (Measured(91, "", 90, 60, 94, tolerance=5), "undecided"),  # the study does not tell enough
        (Measured(91, "", 85, 86, 94, rule=">", tolerance=5), "not comparable"),  # no test
        (Measured(80, "", 85, 79, 84, rule=">", tolerance=5), "contradicted"),
        (Measured(91, "", 85, 84, 94, rule=">", tolerance=5), "undecided"),
        (Measured(40, "", 40, rule="<=", tolerance=0), "reproduced"),
        (Measured(41, "", 40, rule="<=", tolerance=0), "contradicted"),
        (Measured(1.0, "", 2.3, 0.1, 1.9, rule="side of 0"), "reproduced"),
        (Measured(1.0, "", 2.3, -0.1, 2.1, rule="side of 0"), "undecided"),
        (Measured(1.0, "", -2.3, 0.1, 1.9, rule="side of 0"), "contradicted"),
        (Measured(-1.0, "", -2.3, -1.5, -0.5, rule="side of 0"), "reproduced"),
        (Measured(1.0, "", 2, 0.1, 1.9, rule="<"), "reproduced"),
        (Measured(1.0, "", 2, 0.1, 2.1, rule="<"), "undecided"),
        (Measured(3.0, "", 2, 2.0, 4.0, rule="<"), "contradicted"),
    ],
)
def test_the_verdict_follows_the_rule(ours, says):
    word, why = verdict(ours)
    assert word == says and word in VERDICTS and why


@pytest.mark.parametrize(
    ("changes", "source", "why"),
    [
        ({"data": "phantom of 100 (synthetic)"}, "Wang 2017", "synthetic"),
        ({"split": {"name": "patient", "images": {"train": 112120}}}, "Wang 2017", "another split"),
        ({"split": {"name": "patient", "images": {"train": 112120}}}, "CheXNet", "interval"),
        ({"split": {"name": "image", "images": {"train": 112120}}}, "CheXNet", "another split"),
        (
            {"split": {"name": "official", "images": {"train": 999, "test": 100}}},
            "Wang 2017",
            "1,099 of the release",
        ),
        ({}, "Wang 2017", "interval"),
        ({}, "Dell DenseNet", "leaks"),
    ],
)
def test_an_auroc_is_compared_on_the_release_and_a_split_of_its_kind_alone(changes, source, why):
    table = ledger(results(1, **changes))
    own = table.loc[f"auroc/{source}/Mass"]
    assert why in own["why"]
    assert (own["verdict"] == "not comparable") == (why != "interval")


def test_what_this_run_has_comes_before_reference_results_which_are_named(tmp_path, monkeypatch):
    kept = {name: results(seed)["03"] for name, seed in (("run", 1), ("reference", 2))}
    names = ("metrics", "params", "environment")
    for file in (
        tmp_path / "data" / "reference" / "03_train.json",
        tmp_path / "data" / "reference" / "06_recipes.json",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        own = kept["reference"] if file.stem == "03_train" else results(2)["06"]
        write_json(file, {name: getattr(own, name) for name in names})
    run = tmp_path / "run" / "03_train"
    run.mkdir(parents=True)
    monkeypatch.setattr(answers, "ROOT", tmp_path)
    alone = build_ledger(tmp_path / "run")
    measured = alone["ours"].notna() & (alone["topic"] != "itself")
    assert set(alone.loc[measured, "origin"]) == {"reference results"}
    for name in names:
        write_json(run / f"{name}.json", getattr(kept["run"], name))
    both = build_ledger(tmp_path / "run")
    assert both.loc["auroc/CheXNet/Mass", "ours"] == kept["run"].metrics["auroc"]["Mass"]["auroc"]
    assert both.loc["auroc/CheXNet/Mass", "origin"] == "this run"
    assert both.loc["ladder/+ warm-up", "origin"] == "reference results"
    assert both.loc["batch norm/vgg16", "verdict"] == "not comparable" and np.isnan(
        both.loc["batch norm/vgg16", "ours"]
    )


def test_what_this_run_did_not_measure_is_answered_by_the_reference_which_is_named():
    run, kept = results(1)["11"], results(2)["11"]
    quick = Results(
        "11",
        {**run.metrics, "solution": {}, "ratio": {}},
        reference=dataclasses.replace(kept, origin="kept"),
    )
    table = ledger({"11": quick})
    for key, origin in {
        "densenet/64/time": "kept",
        "fine-tuning/keras": "kept",
        "scale/caffe-256/speed": "this run",
    }.items():
        (name,) = [name for name in table.index if name.startswith(key)]
        assert table.loc[name, "origin"] == origin
    assert (
        table.loc["densenet/64/time", "ours"]
        == kept.metrics["solution"]["densenet121"]["seconds"] / 60
    )


def test_a_record_that_lacks_a_field_is_not_filled_from_the_reference_and_says_what_it_lacks():
    kept = dataclasses.replace(results(2)["06"], origin="kept")
    metrics = results(1)["06"].metrics
    for lacks, key in {"ladder": "ladder/+ warm-up", "collapse": "collapse/top-1/1/before"}.items():
        rest = {name: value for name, value in metrics.items() if name != lacks}
        table = ledger({"06": Results("06", rest, reference=kept)})
        assert f"'{lacks}'" in table.loc[key, "why"]
        assert (
            table.loc[key, "verdict"] == "not comparable" and table.loc[key, "origin"] == "this run"
        )
    for row in metrics["losses"]:
        del row["baseline"]
    table = ledger({"06": Results("06", metrics, reference=kept)})
    assert "'baseline'" in table.loc["large batches/the study/64K", "why"]
    assert table.loc["collapse/top-1/1/before", "ours"] > 0


@pytest.mark.parametrize("record", RECORDS.values())
def test_a_notebook_cannot_leave_out_what_the_ledger_reads(record):
    names = [field.name for field in dataclasses.fields(record)]
    for left_out in names:
        with pytest.raises(TypeError, match=f"'{left_out}'"):
            record(**{name: 0 for name in names if name != left_out})


@functools.cache
def saved_by(number):
    """The names of the record that a notebook hands to the ledger as it saves its results."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    cells = [cell.source for cell in nbformat.read(path, 4).cells if "run.finish(" in cell.source]
    call = next(
        node
        for node in ast.walk(ast.parse(cells[-1]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.finish"
    )
    (record,) = call.args
    assert ast.unparse(record.func) == f"records.{RECORDS[number].__name__}"
    return {keyword.arg for keyword in record.keywords}


@pytest.mark.parametrize("number", RECORDS)
def test_a_notebook_saves_its_record(number):
    assert saved_by(number) == {field.name for field in dataclasses.fields(RECORDS[number])}


@pytest.mark.parametrize("kind", COUNTERPARTS)
def test_a_row_reads_nothing_of_its_notebook_but_the_record(kind):
    number, find = COUNTERPARTS[kind]
    if number == ITSELF:
        return
    record = results(1)[number].record
    alone = SimpleNamespace(record=record, params={"size": 64}, environment={})
    for claim in claims():
        if claim.kind == kind:
            assert find(claim, alone) == find(claim, results(1)[number])


def test_every_figure_has_a_kind_that_is_answered_or_a_reason():
    for claim in claims():
        assert (claim.kind in COUNTERPARTS) != bool(claim.reason), claim.key
    assert {claim.kind for claim in claims()} == {"", *COUNTERPARTS}


def test_counts_add_up_to_the_figures():
    counts = count_verdicts(ledger(results(1)))
    assert counts.loc["all", list(VERDICTS)].sum() == len(claims())
    assert counts.loc["all", "with ours"] == ledger(results(1))["ours"].notna().sum()


# --- the published figures


def numbers(text):
    return {
        float(n.replace(",", ""))
        for n in re.findall(r"\d[\d,]*\d(?:\.\d+)?|\d(?:\.\d+)?|\.\d+", text)
    }


def test_each_figure_is_there_once_with_source_and_setting():
    keys = [claim.key for claim in claims()]
    assert len(keys) == len(set(keys))
    assert all(claim.source and claim.setting and claim.unit and claim.what for claim in claims())


@pytest.mark.skipif(
    PUBLISHED is None, reason="the list of published figures is not beside this project"
)
def test_the_figures_are_all_those_of_the_list():
    text = Path(PUBLISHED).read_text()
    have = set().union(
        *(numbers(f"{c.what} {c.setting} {c.source}") | {float(c.value)} for c in claims())
    )
    assert numbers(text) - have == set()
    table = published_auroc()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in FINDINGS:
            assert list(table.loc[cells[0]]) == [float(cell) for cell in cells[1:]]
    tops = {round(c.value * 100) for c in claims() if c.topic == "collapse"}
    points = text.split("Ensemble points")[1].split("64K converges")[0]
    assert tops == {round(100 * n) for n in numbers(points) if n > 60}


@pytest.mark.skipif(
    PUBLISHED is None, reason="the list of published figures is not beside this project"
)
@pytest.mark.parametrize(
    ("line", "keys"),
    [
        (
            r"Caffe.*\| 256 \| (.*) img/s, (.*) % eff\w*, (.*) min, > (.*) / (.*) % \|",
            "caffe-256/speed caffe-256/efficiency caffe-256/time caffe-256/top-1 caffe-256/top-5",
        ),
        (
            r"Caffe.*\| 512 \| (.*) min; > (.*) % eff\w* from 256 to 512 nodes, (.*) % \|",
            "caffe-512/time caffe-512/efficiency caffe-512/top-1",
        ),
        (
            r"Stampede2 \| 256 / 512 \| (.*) / (.*) img/s \((.*) %\), about (.*) h on 256 \|",
            "tensorflow-256/speed tensorflow-512/speed tensorflow-512/efficiency "
            "tensorflow-256/time",
        ),
        (
            r"this work.*\| 448 \| (.*) TF peak, (.*) min, (.*) % \|",
            "caffe-448/peak caffe-448/time caffe-448/efficiency",
        ),
        (
            r"Facebook, P100 \| 32 .*\| (.*) TF, (.*) min, (.*) % \|",
            "facebook-32/peak facebook-32/time facebook-32/efficiency",
        ),
        (
            r"You et al.*\| 1024 \| (.*) TF, (.*) min, (.*) % \|",
            "you-1024/peak you-1024/time you-1024/efficiency",
        ),
        (
            r"DenseNet-121.*\| 64 \| (.*) s/epoch, (.*) epochs, .*, (.*) % \|",
            "64/epoch 64/epochs 64/top-1",
        ),
        (
            r"DenseNet-121.*\| 128 \| (.*) s/epoch, (.*) epochs, .*, (.*) % \|",
            "128/epoch 128/epochs 128/top-1",
        ),
        (
            r"fine-tuning ResNet-50.*Keras (.*) s/epoch, TensorFlow (.*) s/epoch",
            "fine-tuning/keras fine-tuning/tensorflow",
        ),
    ],
)
def test_the_figures_of_scale_are_each_at_its_place(line, keys):
    (told,) = re.findall(line, Path(PUBLISHED).read_text())
    values = {claim.key: claim.value for claim in claims()}
    own = [
        [value for key, value in values.items() if f"/{key}".endswith(f"/{end}")]
        for end in keys.split()
    ]
    assert own == [[float(number.replace(",", ""))] for number in told]


def test_the_ledger_is_plain_values_for_json():
    rows = ledger(results(1)).reset_index().to_dict("records")
    assert len(json.loads(json.dumps(rows))) == len(claims())


def test_where_no_seed_has_all_trainings_there_is_a_reason_and_no_verdict():
    from chexlib.evaluation.intervals import has_learnt, nothing_learnt

    for nothing in (None, float("nan")):
        assert not has_learnt(nothing)
        assert nothing_learnt(nothing) == "no seed has all of the trainings that are compared"
