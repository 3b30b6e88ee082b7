"""Ensembles: combined as said, chosen on validation, judged with paired intervals, and one file
that predicts.
"""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from chexlib.errors import ConfigError, DataError
from chexlib.evaluation.ensembles import choose, diversity, mean_auroc, save_ensemble, stack
from chexlib.findings import FINDINGS
from chexlib.models.combine import combine
from chexlib.models.predict import predict
from chexlib.models.topologies import build_model
from chexlib.models.weights import load_model, save_model


@pytest.fixture(scope="module")
def scored():
    """Four members of 300 images of 100 patients: three that err apart from each other, and one
    that only guesses.
    """
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 14)) < 0.3).astype(np.float32)
    logits = 1.5 * labels + rng.normal(size=(4, 300, 14)) - 1
    logits[3] = rng.normal(size=(300, 14))
    return 1 / (1 + np.exp(-logits)), labels, np.repeat(np.arange(100), 3)


def test_members_are_combined_by_probability_logit_or_rank(scored):
    scores = scored[0]
    np.testing.assert_allclose(combine(scores), scores.mean(0), atol=1e-6)
    logits = np.log(scores / (1 - scores)).mean(0)
    np.testing.assert_allclose(combine(scores, how="logit"), 1 / (1 + np.exp(-logits)), atol=1e-5)
    ranks = ((rankdata(scores, axis=1) - 1) / (scores.shape[1] - 1)).mean(0)
    np.testing.assert_allclose(combine(scores, how="rank"), ranks, atol=0.01)
    squeezed = scores.copy()
    squeezed[0] = squeezed[0] ** 3  # surer, in the same order: ranks do not change
    np.testing.assert_allclose(combine(squeezed, how="rank"), ranks, atol=0.01)
    assert np.abs(combine(squeezed) - combine(scores)).max() > 0.05
    with pytest.raises(ConfigError, match="how='median' is not known"):
        combine(scores, how="median")


def test_the_greedy_choice_takes_what_gains_and_leaves_the_guesser(scored):
    scores, labels, _ = scored
    chosen = choose(scores, labels)
    alone = [np.mean([roc_auc_score(labels[:, f], s[:, f]) for f in range(14)]) for s in scores]
    assert chosen[0] == int(np.argmax(alone)) and sorted(chosen) == [0, 1, 2]
    assert mean_auroc(labels, combine(scores[chosen])) > max(alone) + 0.02
    assert choose(scores, labels, most=2) == chosen[:2]


def test_diversity_is_one_less_spearmans_correlation(scored):
    scores = np.concatenate([scored[0], scored[0][:1] ** 2])
    table = diversity(scores, ["a", "b", "c", "guesser", "a squared"])
    expected = np.mean(
        [1 - spearmanr(scores[0, :, f], scores[1, :, f]).statistic for f in range(14)]
    )
    assert table.loc["a", "b"] == pytest.approx(expected, abs=1e-9)
    assert table.loc["a", "a squared"] == 0 and table.loc["guesser", "a"] == pytest.approx(
        1, abs=0.1
    )


def test_predictions_of_other_images_are_refused(scored):
    scores, labels, patients = scored

    def table(images):
        frame = pd.DataFrame({"image": images, "patient": patients, "part": "test"})
        frame[[f"label_{f}" for f in FINDINGS]] = labels
        frame[[f"score_{f}" for f in FINDINGS]] = scores[0]
        return frame

    same, other = (
        table([f"{i}.png" for i in range(300)]),
        table([f"{i + 1}.png" for i in range(300)]),
    )
    stacked, y, who = stack({"a": same, "b": same}, part="test")
    assert (
        stacked.shape == (2, 300, 14)
        and np.array_equal(y, labels)
        and np.array_equal(who, patients)
    )
    with pytest.raises(DataError, match="b has scored other images"):
        stack({"a": same, "b": other}, part="test")
    with pytest.raises(DataError, match="no part 'validation'"):
        stack({"a": same}, part="validation")


@pytest.mark.parametrize("how", ["probability", "logit", "rank"])
def test_one_file_predicts_what_its_members_say_together(how, files, tmp_path):
    network = {"topology": "vgg16", "width": 0.25, "size": 32}
    card = {**network, "split": {"name": "patient"}}
    models = [build_model(**network, seed=seed) for seed in (0, 1)]
    members = [
        save_model(model, tmp_path / f"{seed}.keras", card=card)
        for seed, model in enumerate(models)
    ]
    alone = np.stack([predict(files[0], weights=member).to_numpy() for member in members])
    assert np.abs(alone[0] - alone[1]).max() > 0.05
    reference = np.random.default_rng(0).random((2, 50, 14)) if how == "rank" else None
    file = save_ensemble(members, tmp_path / "ensemble.keras", how=how, reference=reference)
    together = predict(files[0], weights=file)
    np.testing.assert_allclose(together, combine(alone, how=how, reference=reference), atol=1e-5)
    card = load_model(file)[1]
    assert card["how"] == how and len(card["members"]) == 2 and card["size"] == 32
    with pytest.raises(ConfigError, match="needs reference scores"):
        save_ensemble(members, tmp_path / "other.keras", how="rank")
