"""`python -m chexlib card RUN`: the model card of a training, with the numbers of its own files and
no others.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from chexlib.data.nih import data_name
from chexlib.errors import DataError, WeightsError
from chexlib.evaluation.auroc import in_words, judge
from chexlib.files import atomic_write
from chexlib.models.weights import config_of, read_card


def write_card(run: str | Path) -> Path:
    """Write `MODEL_CARD.md` beside a `model.keras` and the `predictions.parquet` of its training.

    Parameters
    ----------
    run : path
        A folder with both, or one with a single such folder in it.

    Returns
    -------
    Path
        The card.

    Raises
    ------
    WeightsError, DataError
        No model, or more than one; predictions that are missing or cannot be judged.
    """
    import jinja2

    folder = _folder(Path(run))
    facts = read_card(folder / "model.keras")
    config = config_of(folder, facts)
    # No paths of this machine.
    config["weights"] = Path(config.get("weights") or "random weights").name
    try:
        predictions = pd.read_parquet(folder / "predictions.parquet")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}/predictions.parquet cannot be read ({error}). Name the folder of a run."
        ) from error
    judged = judge(predictions)
    found = [
        (name.replace("_", " "), in_words(row), int(row["positives"]))
        for name, row in judged.iterrows()
    ]
    metrics = _read(folder / "metrics.json")
    data = (
        metrics.get("data")
        or facts.get("data")
        or data_name(Path(config.get("data_dir", "unknown")))
    )
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    settings = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=loader, **settings)
    try:
        text = environment.get_template("MODEL_CARD.md").render(
            facts=facts,
            config={
                name: config[name]
                for name in sorted(config)
                if not name.endswith("_dir") and name != "resume"
            },
            data=data,
            synthetic="synthetic" in data,
            found=found,
            few=[name for name, text, _ in found[:-1] if "to" not in text.split()],
            test=predictions[predictions["part"] == "test"],
            environment=_read(folder / "environment.json"),
            run="/".join(folder.parts[-2:]),
            details={
                name: _lines(facts[name])
                for name in ("calibration", "operating_points")
                if facts.get(name)
            },
        )
    except jinja2.UndefinedError as error:
        reason = f"the card in {folder / 'model.keras'} lacks something: {error}"
        raise WeightsError(
            f"{reason}. Name the folder of a training, or add it with `extend_card`."
        ) from error
    with atomic_write(folder / "MODEL_CARD.md") as file:
        file.write(text.encode())
    return folder / "MODEL_CARD.md"


def _folder(run: Path) -> Path:
    found = (
        [run]
        if (run / "model.keras").is_file()
        else sorted(path.parent for path in run.glob("*/model.keras"))
    )
    if len(found) != 1:
        several = (
            f"holds several: {', '.join(path.name for path in found)}"
            if found
            else "has no model.keras"
        )
        raise WeightsError(
            f"{run} {several}. Name the folder of one training, such as "
            f"{run / '03_train_baseline'}."
        )
    return found[0].resolve()


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _lines(value, name: str = "") -> list[str]:
    """A plain value as lines "a, b: 0.5", numbers to four digits."""
    if isinstance(value, dict):
        return [
            line
            for key, inner in value.items()
            for line in _lines(inner, f"{name}, {key}" if name else str(key))
        ]
    if isinstance(value, list) and len(value) > 8:
        return [f"{name}: {len(value)} values"]
    values = value if isinstance(value, list) else [value]
    return [f"{name}: " + ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)]
