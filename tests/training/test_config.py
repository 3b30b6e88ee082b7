"""A training's settings are refused when they are made, by name and value, not minutes later."""

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest

from chexlib.errors import ChexlibError, ConfigError
from chexlib.findings import FINDINGS
from chexlib.models.topologies import SIZES, build_model
from chexlib.models.weights import CARD, read_card
from chexlib.training.config import OPTIMIZERS, PRECISIONS, SPLITS, TrainConfig
from chexlib.training.input import divide

NEEDED = {"data_dir": "data", "run_dir": "runs"}
BAD = {
    "data_dir": [None, 3],
    "run_dir": [None, 3],
    "topology": ["densenet", "", None, "DenseNet121"],
    "size": [31, 0, -1, 1025, 64.0, "64", True, None],
    "width": [0.3, 0, "1", None, True],
    "stem": ["tiny", "", None, True],
    "weights": [5, True],
    "batch_size": [0, -1, 1.5, "16", True],
    "epochs": [0, -3, 2.0, "3", False],
    "max_steps": [-1, 0.5, "7", None],
    "optimizer": ["Adam", "rmsprop", None],
    "weight_decay": [-1, float("nan"), "0.1", None, True],
    "schedule": [None, 5, "448", "{", {"phases": []}, {"preset": "64k", "peaks": 1}],
    "augment": ["strong", None, True],
    "learning_rate": [0, -1e-3, float("nan"), float("inf"), 1e308, "1e-3", None, True],
    "plateau_factor": [0, -0.1, 1.1, float("nan"), "0.1", None],
    "mirror": ["false", 1, None],
    "precision": ["bfloat16", "float16", None],
    "accumulation": [0, 1.5, "2", True],
    "norm": ["layer", "", None, "Batch"],
    "ghost_size": [-1, 8, 0.5, None],
    "group_share": [-0.1, 1.1, float("nan"), "0.5", None],
    "head_bias": [float("nan"), float("inf"), "1", True],
    "plateau_delta": [-0.1, float("nan"), "0.1", None],
    "norm_momentum": [-0.1, 1, float("nan"), "0.9", None],
    "stage_rate": [-0.1, 1.1, float("nan"), "1", None],
    "fresh_head": ["true", 1, None],
    "recalibrate": [-1, 0.5, "256", True],
    "snapshots": ["true", 6, None],
    "split": ["random", "", None, "fold-0-of-5", "fold-6-of-5", "fold-2"],
    "allow_leak": ["false", "no", 0, None],
    "shuffle_labels": ["false", 1, None],
    "split_seed": [-1, 1.0, "1", True],
    "max_images": [-1, 10.0, "100", True],
    "train_images": [-1, 10.0, "100", True],
    "skip_broken": ["false", 1, None],
    "seed": [-1, 0.5, "0", None],
    "checkpoint_steps": [-1, 0.5, "7", None],
    "keep_checkpoints": [-1, 1.5, "2", None],
    "resume": ["true", 1, None],
    "resume_keeps": ["batch", "", None],
}


def config(**changes):
    return TrainConfig(**{**NEEDED, **changes})


def test_a_size_that_trains_is_read_again_and_no_other_is_built(tmp_path):
    least, largest = SIZES
    for size in SIZES:
        with zipfile.ZipFile(tmp_path / f"{size}.keras", "w") as archive:
            card = {**config(size=size).network(), "findings": FINDINGS}
            archive.writestr(CARD, json.dumps(card))
        assert read_card(tmp_path / f"{size}.keras")["size"] == size
    for size in (least - 1, largest + 1):
        with pytest.raises(ConfigError, match=f"size={size} is not accepted. Use 32 to 1024"):
            build_model("vgg16", size=size)


def test_settings_of_older_files_are_left_out_where_they_mean_what_is_done_now():
    old = {**config().to_dict(), "plateau_patience": 1, "early_stop": 0}
    assert TrainConfig.from_dict(old) == config()
    with pytest.raises(ConfigError, match="no setting early_stop"):
        TrainConfig.from_dict({**old, "early_stop": 2})


LONG = 10**400
BEYOND = [
    *((name, LONG) for name in ("learning_rate", "weight_decay", "norm_momentum", "stage_rate")),
    *((name, 2**63) for name in ("seed", "split_seed", "epochs", "size", "batch_size")),
    *((name, "a\0b") for name in ("data_dir", "run_dir", "weights")),
    ("plateau_factor", LONG),
    ("schedule", {"preset": []}),
    ("schedule", {"preset": {}}),
    ("schedule", {"rate": [[1]]}),
    ("schedule", '{"a": ' + "[" * 100_000),
]


@pytest.mark.parametrize(("name", "value"), BEYOND)
def test_what_no_number_path_or_json_can_be_is_refused_in_one_line(name, value):
    with pytest.raises(ConfigError) as error:
        config(**{name: value})
    assert str(error.value).startswith(f"{name}=") and "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_every_setting_has_a_bad_value_here():
    assert set(BAD) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_value_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ConfigError) as error:
        config(**{name: value})
    assert name in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", ["size", "epochs", "seed", "topology"])
def test_the_message_says_what_is_accepted(name):
    accepted = {
        "size": "32",
        "epochs": "1",
        "seed": "0",
        "topology": "densenet121, resnet50, vgg16, vgg16_bn",
    }
    with pytest.raises(ConfigError, match=accepted[name]):
        config(**{name: "wrong"})


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "topology": ("densenet121", "resnet50", "vgg16", "vgg16_bn"),
        "split": SPLITS,
        "optimizer": OPTIMIZERS,
        "precision": PRECISIONS,
        "size": (32, 1024),
        "batch_size": (1,),
        "epochs": (1,),
        "max_steps": (0, 1),
        "learning_rate": (1e-9, 1, 100.0),
        "plateau_factor": (1, 0.5, 1e-3),
        "norm_momentum": (0, 0.99),
        "max_images": (0, 1),
        "train_images": (0, 1),
        "seed": (0, 2**40),
        "split_seed": (None, 0, 2**40),
    }.items(),
)
def test_what_is_accepted_is_kept(name, values):
    for value in values:
        assert getattr(config(**{name: value}), name) == value


def test_trainings_of_other_seeds_share_their_data_if_the_split_has_a_seed_of_its_own(phantom):
    def data(**seeds):
        split, parts = divide(
            config(data_dir=str(phantom), split="patient", max_images=50, **seeds)
        )
        return split.digest, [list(part.table["image"]) for part in parts.values()]

    assert data(seed=1, split_seed=0) == data(seed=2, split_seed=0) == data(seed=0)
    assert data(seed=1) != data(seed=0)


def test_the_defaults_are_chexnets_recipe():
    c = config()
    assert (c.topology, c.size, c.optimizer, c.learning_rate) == ("densenet121", 224, "adam", 1e-3)
    assert (c.batch_size, c.plateau_factor, c.mirror) == (16, 0.1, True)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().epochs = 5


def test_an_unknown_setting_is_refused_by_name_with_what_is_accepted():
    with pytest.raises(
        ConfigError, match=r"no setting epoch\. Did you mean 'epochs'\? Use some of .*stage_rate"
    ):
        TrainConfig.from_dict({**NEEDED, "epoch": 3})


@pytest.mark.parametrize("missing", ["data_dir", "run_dir"])
def test_a_missing_setting_is_refused_by_name(missing):
    with pytest.raises(ChexlibError, match=missing):
        TrainConfig.from_dict({name: value for name, value in NEEDED.items() if name != missing})


@pytest.mark.parametrize("values", [[], "text", 3, None])
def test_settings_that_are_no_dictionary_are_refused(values):
    with pytest.raises(ChexlibError):
        TrainConfig.from_dict(values)


def test_plain_values_make_the_same_config_again_through_json():
    values = {
        "topology": "vgg16",
        "size": 64,
        "weights": "w.keras",
        "allow_leak": True,
        "learning_rate": 0.02,
        "seed": 9,
    }
    made = config(**values)
    assert TrainConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_replacing_makes_a_copy_and_validates_it():
    first = config(epochs=2)
    second = first.replace(epochs=3)
    assert (first.epochs, second.epochs) == (2, 3)
    assert second.replace(epochs=2) == first
    with pytest.raises(ConfigError, match="epochs=0"):
        first.replace(epochs=0)


def test_paths_are_absolute_so_that_engines_elsewhere_find_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = config(data_dir="nih", run_dir=Path("out") / "run", weights="w.keras")
    assert made.data_dir == str(tmp_path / "nih")
    assert made.run_dir == str(tmp_path / "out" / "run")
    assert made.weights == str(tmp_path / "w.keras")
    monkeypatch.chdir("/")
    assert TrainConfig.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(("given", "kept"), [(None, None), ("", None), ("imagenet", "imagenet")])
def test_weights_that_are_no_file_stay_as_they_are(given, kept):
    assert config(weights=given).weights == kept


def test_a_schedule_may_be_a_name_an_object_or_its_json_and_survives_json():
    spec = {"unit": "epochs", "phases": [{"kind": "step", "length": 3, "rate": 0.1, "at": (1, 2)}]}
    as_object, as_json = config(schedule=spec), config(schedule=json.dumps(spec))
    assert as_object == as_json and as_object.schedule["phases"][0]["at"] == [1, 2]
    assert TrainConfig.from_dict(json.loads(json.dumps(as_object.to_dict()))) == as_object
    assert config(schedule="goyal-2017").schedule == "goyal-2017"
    with pytest.raises(ConfigError, match="which has its own"):
        config(schedule=spec, weight_decay=0.1)


def test_a_preset_is_stretched_over_the_epochs_so_resuming_with_others_is_refused():
    there = config(schedule="goyal-2017", epochs=6).to_dict()
    with pytest.raises(ConfigError, match="epochs=6 there and 8 now"):
        config(schedule="goyal-2017", epochs=8).require_same(there, where="it")
    fixed = {"preset": "goyal-2017", "epochs": 8}
    config(schedule=fixed, epochs=8).require_same(
        config(schedule=fixed, epochs=6).to_dict(), where="it"
    )


def test_a_training_of_version_0_1_which_had_the_published_networks_only_can_be_resumed():
    there = {
        name: value for name, value in config().to_dict().items() if name not in ("width", "stem")
    }
    config().require_same(there, where="it")
    with pytest.raises(ConfigError, match=r"width=1\.0 there and 0\.25 now"):
        config(width=0.25).require_same(there, where="it")


def test_width_and_stem_are_settings_and_travel_with_the_network():
    made = config(topology="resnet50", size=32, width=0.25, stem="small")
    assert made.network() == {"topology": "resnet50", "width": 0.25, "stem": "small", "size": 32}
    assert config(width=1) == config() and isinstance(config(width=1).width, float)
