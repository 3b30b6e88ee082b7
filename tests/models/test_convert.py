"""Public PyTorch weights in our DenseNet-121: the same probabilities, or an error that names what
does not fit.
"""

import json
import re
import zipfile

import h5py
import keras
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import save_file

import chexlib.models.topologies
import chexlib.models.weights
from chexlib.errors import WeightsError
from chexlib.findings import FINDINGS
from chexlib.models.convert import (
    FROM_KERAS_2,
    TO_SAFETENSORS,
    TORCHXRAYVISION,
    load_torch_weights,
)
from chexlib.models.topologies import build_model
from chexlib.models.weights import WITH_CARD, create_model, load_weights, read_card

PIXELS = (
    np.random.default_rng(0).integers(0, 256, (2, 64, 64)) * np.array([1.0, 0.2])[:, None, None]
)  # one is dark
MEAN, DEVIATION = (
    np.array([0.485, 0.456, 0.406]),
    np.array([0.229, 0.224, 0.225]),
)  # of torchvision's transforms
STATISTICS = ("weight", "bias", "running_mean", "running_var")
XRV_EXTRA = ["op_threshs", "Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum"]


def state_dict(*, channels=3, outputs=14, seed=1):
    """A state dict in torchvision's layout with random weights, as large as keeps the signal alive."""
    rng, state, width = np.random.default_rng(seed), {}, 64

    def convolution(name, shape):
        state[f"{name}.weight"] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(
            np.float32
        )

    def norm(name, n):
        variance = 10 ** rng.uniform(-6, 0, n)  # small ones too, where the epsilons differ
        gain = rng.uniform(0.5, 1.5, n) * np.sqrt(variance + 1e-5)
        values = gain, rng.normal(0, 0.3, n), rng.normal(0, 0.3, n), variance
        state.update(
            {
                f"{name}.{key}": v.astype(np.float32)
                for key, v in zip(STATISTICS, values, strict=True)
            }
        )
        state[f"{name}.num_batches_tracked"] = np.array(7, np.int64)

    convolution("features.conv0", (64, channels, 7, 7))
    norm("features.norm0", 64)
    for block, layers in enumerate((6, 12, 24, 16), 1):
        for i in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{i}"
            norm(f"{name}.norm1", width)
            convolution(f"{name}.conv1", (128, width, 1, 1))
            norm(f"{name}.norm2", 128)
            convolution(f"{name}.conv2", (32, 128, 3, 3))
            width += 32
        if block < 4:
            norm(f"features.transition{block}.norm", width)
            convolution(f"features.transition{block}.conv", (width // 2, width, 1, 1))
            width //= 2
    norm("features.norm5", width)
    state["classifier.weight"] = rng.normal(0, 0.05, (outputs, width)).astype(np.float32)
    state["classifier.bias"] = rng.normal(0, 0.5, outputs).astype(np.float32)
    return state


def forward(state, images):
    """torchvision's DenseNet-121 by its source, in float64: (n, channels, h, w) -> (n, outputs)
    after a sigmoid.
    """

    def conv(x, name, *, stride=1, padding=0):
        w = state[f"{name}.weight"].astype(np.float64)
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = sliding_window_view(x, w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
        return np.tensordot(windows, w, axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)

    def norm(x, name):
        gain, bias, mean, variance = (
            state[f"{name}.{key}"].astype(np.float64)[:, None, None] for key in STATISTICS
        )
        return gain * (x - mean) / np.sqrt(variance + 1e-5) + bias

    def relu(x):
        return np.maximum(x, 0)

    x = relu(norm(conv(images, "features.conv0", stride=2, padding=3), "features.norm0"))
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max((4, 5))
    for block, layers in enumerate((6, 12, 24, 16), 1):
        for i in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{i}"
            new = conv(relu(norm(x, f"{name}.norm1")), f"{name}.conv1")
            new = conv(relu(norm(new, f"{name}.norm2")), f"{name}.conv2", padding=1)
            x = np.concatenate([x, new], 1)
        if block < 4:
            x = conv(
                relu(norm(x, f"features.transition{block}.norm")),
                f"features.transition{block}.conv",
            )
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    pooled = relu(norm(x, "features.norm5")).mean((2, 3))
    logits = pooled @ state["classifier.weight"].T.astype(np.float64) + state["classifier.bias"]
    return 1 / (1 + np.exp(-logits))


def normalised():
    """As CheXNet takes them: three equal channels, ImageNet's mean and deviation."""
    return ((PIXELS[..., None] / 255 - MEAN) / DEVIATION).transpose(0, 3, 1, 2)


def names_of_2017(state, prefix="module.densenet121."):
    """The same tensors as in the file of arnoweng/CheXNet."""
    renamed = {}
    for name, tensor in state.items():
        for part in ("norm", "conv"):
            for number in "12":
                name = name.replace(f".{part}{number}.", f".{part}.{number}.")
        renamed[prefix + name.replace("classifier.", "classifier.0.")] = tensor
    return renamed


@pytest.fixture(scope="module")
def model():
    return build_model("densenet121", size=64)


@pytest.fixture(scope="module")
def public():
    return state_dict()


@pytest.fixture(scope="module")
def expected(public):
    return forward(public, normalised())


@pytest.fixture
def saved(tmp_path):
    def save(tensors, metadata=None):
        save_file(tensors, tmp_path / "public.safetensors", metadata)
        return tmp_path / "public.safetensors"

    return save


def scores(model):
    return model(PIXELS[..., None].astype(np.float32), training=False).numpy()


@pytest.mark.parametrize(
    "rename", [dict, names_of_2017, lambda s: {f"model.{k}": v for k, v in s.items()}]
)
def test_converted_weights_give_the_probabilities_of_the_public_network(
    model, public, expected, saved, rename
):
    report = load_torch_weights(model, saved(rename(public)))
    assert np.ptp(expected, axis=0).mean() > 0.01  # the outputs depend on the pixels
    np.testing.assert_allclose(scores(model), expected, rtol=0, atol=1e-4)
    loaded = report[report["fate"] == "loaded"]
    assert len(loaded) == len(model.weights) == 121 * 4 + 120 + 2
    assert sorted(report["tensor"]) == sorted(
        public
    )  # each once: loaded, or a counter that is left out
    assert set(report["tensor"]) - set(loaded["tensor"]) == {
        k for k in public if k.endswith("num_batches_tracked")
    }
    stem = report.set_index("tensor").loc["features.conv0.weight"]
    assert (stem["layer"], stem["weight"], stem["shape"]) == ("conv1_conv", "kernel", (64, 3, 7, 7))


@pytest.mark.parametrize("where", ["argument", "metadata"])
def test_findings_go_to_their_outputs_by_name(model, public, expected, saved, where):
    order = sorted(FINDINGS)
    spelt = [name.replace("_", " ") for name in order]
    rows = [FINDINGS.index(name) for name in order]
    shuffled = public | {key: public[key][rows] for key in ("classifier.weight", "classifier.bias")}
    given = {"findings": spelt} if where == "argument" else {}
    load_torch_weights(
        model, saved(shuffled, {"findings": json.dumps(spelt)} if not given else None), **given
    )
    np.testing.assert_allclose(scores(model), expected, rtol=0, atol=1e-4)


def test_torchxrayvisions_grey_input_and_18_outputs_become_ours(model, saved):
    state = state_dict(channels=1, outputs=18, seed=2)
    state["features.conv0.weight"] /= 600  # the pixels are that large
    grey = (2 * PIXELS[:, None] / 255 - 1) * 1024
    theirs = forward(state, grey)[:, [TORCHXRAYVISION.index(name) for name in FINDINGS]]
    path = saved(state | {"op_threshs": np.zeros(18, np.float32)})
    report = load_torch_weights(model, path, findings=TORCHXRAYVISION, unused=XRV_EXTRA)
    assert np.ptp(theirs, axis=0).mean() > 0.01
    np.testing.assert_allclose(scores(model), theirs, rtol=0, atol=1e-4)
    assert set(XRV_EXTRA) <= set(report.loc[report["fate"] == "left out", "tensor"])


def test_an_imagenet_backbone_keeps_the_head_of_the_model(model, public, saved):
    head = [w.numpy() for w in model.get_layer("findings").weights]
    imagenet = public | {"classifier.weight": np.zeros((1000, 1024), np.float32)}
    report = load_torch_weights(model, saved(imagenet), keep_head=True)
    assert all(
        np.array_equal(a, b.numpy())
        for a, b in zip(head, model.get_layer("findings").weights, strict=True)
    )
    assert set(report.loc[report["fate"] == "kept as it was", "layer"]) == {"findings"}


WRONG = {
    "a tensor too few": (
        lambda s: s.pop("features.denseblock3.denselayer7.conv1.weight"),
        "denselayer7.conv1.weight",
    ),
    "a tensor too many": (lambda s: s.update(extra=np.ones(3, np.float32)), "'extra'"),
    "another shape": (
        lambda s: s.update({"features.norm0.bias": np.ones(63, np.float32)}),
        "features.norm0.bias",
    ),
    "a transposed classifier": (
        lambda s: s.update({"classifier.weight": np.ones((1024, 14), np.float32)}),
        "1024 out",
    ),
    "not a number": (
        lambda s: s["features.norm5.running_mean"].fill(np.nan),
        "features.norm5.running_mean",
    ),
    "1000 outputs": (
        lambda s: s.update({"classifier.weight": np.ones((1000, 1024), np.float32)}),
        "1000 outputs",
    ),
    "a ResNet": (lambda s: [s.pop(k) for k in [*s] if "features" in k], "DenseNet-121"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_file_that_does_not_fit_is_refused_by_name_and_changes_nothing(model, saved, fault):
    spoil, named = WRONG[fault]
    state, before = state_dict(seed=3), model.get_weights()
    spoil(state)
    with pytest.raises(WeightsError, match=named):
        load_torch_weights(model, saved(state))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_outputs_that_are_not_the_14_findings_are_refused(model, public, saved):
    with pytest.raises(WeightsError, match="'Hernia' is 0 times"):
        load_torch_weights(model, saved(public), findings=[*FINDINGS[:13], "Fracture"])


@pytest.mark.parametrize("content", [b"", b"\x80\x04a pickle", None])
def test_what_is_no_safetensors_file_is_refused_with_the_way_to_make_one(model, tmp_path, content):
    path = tmp_path / "model.pth.tar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"save_file"):
        load_torch_weights(model, path)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("model.pth.tar", {"archive/data.pkl": b"\x80"}, TO_SAFETENSORS),
        ("model", {"archive/data.pkl": b"\x80"}, TO_SAFETENSORS),
        ("model.pt", b"\x80\x02a pickle", TO_SAFETENSORS),
        ("checkpoint.pth", b"", TO_SAFETENSORS),
        ("CheXNet_weights.h5", {"layer_names": [b"conv1/conv"]}, FROM_KERAS_2),
        ("model.hdf5", "model_weights", FROM_KERAS_2),
    ],
)
def test_weights_of_others_are_refused_with_the_command_that_converts_them(
    tmp_path, name, content, named
):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif named == TO_SAFETENSORS:
        with zipfile.ZipFile(path, "w") as archive:
            for member, text in content.items():
                archive.writestr(member, text)
    else:
        with h5py.File(path, "w") as file:
            if isinstance(content, dict):
                file.attrs.update(content)
            else:
                file.create_group(content)
    # For a training, for `predict`, and for whoever reads the card.
    for read in (
        lambda: create_model("densenet121", size=32, weights=path),
        lambda: read_card(path),
    ):
        with pytest.raises(WeightsError, match=re.escape(named)) as told:
            read()
        assert "topology" not in str(told.value).split(named)[0]


def test_weights_alone_are_no_model_and_the_command_makes_one(tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(WeightsError, match=re.escape(WITH_CARD)):
        read_card(tmp_path / "weights.safetensors")
    model = build_model("vgg16", size=32, width=0.25, stem="small", seed=2)
    monkeypatch.setattr(chexlib.models.weights, "create_model", lambda *_, **__: model)
    monkeypatch.chdir(tmp_path)
    exec(WITH_CARD.removeprefix("python -c '").removesuffix("'"))
    assert read_card("model.keras")["size"] == 224


@pytest.mark.long
def test_the_command_for_keras_2_moves_every_weight(model, public, saved, tmp_path, monkeypatch):
    """Its two networks are built once, to save time."""
    load_torch_weights(model, saved(public))
    wanted = model.get_weights()
    old = keras.applications.DenseNet121(weights=None, classes=14)
    old.set_weights(wanted)
    old.save(tmp_path / "weights.h5")
    old.set_weights([0 * weight for weight in wanted])
    model.set_weights(old.get_weights())
    monkeypatch.setattr(keras.applications, "DenseNet121", lambda **_: old)
    monkeypatch.setattr(chexlib.models.topologies, "build_model", lambda _: model)
    monkeypatch.chdir(tmp_path)
    exec(FROM_KERAS_2.removeprefix("python -c '").removesuffix("'"))
    model.set_weights([0 * weight for weight in wanted])
    load_weights(model, "new.weights.h5")
    assert all(np.array_equal(a, b) for a, b in zip(wanted, model.get_weights(), strict=True))


def test_another_topology_is_refused(public, saved):
    with pytest.raises(WeightsError, match="densenet121"):
        load_torch_weights(build_model("vgg16", size=32), saved(public))
