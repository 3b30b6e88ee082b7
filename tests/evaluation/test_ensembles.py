"""Ensembles: combined as said, chosen on validation, judged with paired intervals, and one file
that predicts.
"""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from chexlib.errors import DataError
from chexlib.evaluation.auroc import mean_auroc
from chexlib.evaluation.ensembles import choose, save_ensemble, stack
from chexlib.findings import FINDINGS
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


def test_the_greedy_choice_takes_what_gains_and_leaves_the_guesser(scored):
    scores, labels, _ = scored
    chosen = choose(scores, labels)
    alone = [np.mean([roc_auc_score(labels[:, f], s[:, f]) for f in range(14)]) for s in scores]
    assert chosen[0] == int(np.argmax(alone)) and sorted(chosen) == [0, 1, 2]
    assert mean_auroc(labels, scores[chosen].mean(axis=0)) > max(alone) + 0.02


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


def test_one_file_predicts_what_its_members_say_together(files, tmp_path):
    network = {"topology": "vgg16", "width": 0.25, "size": 32}
    card = {**network, "split": {"name": "patient"}}
    models = [build_model(**network, seed=seed) for seed in (0, 1)]
    members = [
        save_model(model, tmp_path / f"{seed}.keras", card=card)
        for seed, model in enumerate(models)
    ]
    alone = np.stack([predict(files[0], weights=member).to_numpy() for member in members])
    assert np.abs(alone[0] - alone[1]).max() > 0.05
    file = save_ensemble(members, tmp_path / "ensemble.keras")
    together = predict(files[0], weights=file)
    np.testing.assert_allclose(together, alone.mean(axis=0), atol=1e-5)
    card = load_model(file)[1]
    assert len(card["members"]) == 2 and card["size"] == 32
