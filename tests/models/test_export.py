"""torch.export and ONNX of a model: the same outputs, for any number of images."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from pml_tacl import AttentionEmbedder

pytestmark = pytest.mark.slow

OPSET = 20
MODELS = {
    "test_resnet": {},
    "test_convnext": {},
    "test_vit": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 1, 1),
        "window_size": 2,
    },
}
BATCH = ({0: Dim("n", min=1, max=256)},)


class WithMaps(nn.Module):
    """All that `forward_features` returns, which is what a search that shows its maps needs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return tuple(self.model.forward_features(images))


def images(n):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(n))


@pytest.fixture(autouse=True)
def few_parts(monkeypatch):
    monkeypatch.setattr("pml_tacl.models.projection.CHANNELS", 8)  # to fit quickly


def build(name, pooling="average", **kwargs):
    """With the pooling, or `"fitted"`: the default one with a fitted projection."""
    torch.manual_seed(0)
    kwargs |= {"pooling": "backbone" if pooling == "fitted" else pooling, **MODELS[name]}
    model = AttentionEmbedder(name, embedding_dim=8, **kwargs).eval()
    if pooling == "fitted":
        model.fit_projection([images(12)], progress=False)
    if hasattr(model.embedder.attention, "score"):  # at the start it is the same everywhere
        nn.init.normal_(model.embedder.attention.score.weight)
    return model


def check(run, model, n):
    with torch.no_grad():
        expected = model(images(n))
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = run(images(n))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-4, atol=1e-5)


ALL = ("backbone", "fitted", "average", "covariance")
# What follows the maps is the same for all: each way once for a network and once for a transformer.
EXPORTED = [(name, pooling) for name in ("test_resnet", "test_vit") for pooling in ALL]
EXPORTED += [(name, "backbone") for name in MODELS if (name, "backbone") not in EXPORTED]


@pytest.mark.parametrize(("name", "pooling"), EXPORTED)
def test_torch_export(name, pooling):
    model = WithMaps(build(name, pooling=pooling))
    exported = torch.export.export(model, (images(2),), dynamic_shapes=BATCH).module()
    for n in (1, 2, 5):
        check(exported, model, n)


def test_torch_export_of_distinctive_attention():
    """For one number of images: how many references are compared at once depends on it."""
    model = build("test_resnet", attention="distinctive")
    with torch.no_grad():
        model.embedder.set_attention_references(model.trunk(images(3)).feature_maps)
    assert model.forward_features(images(2)).attention.std() > 1e-3
    model = WithMaps(model)
    check(torch.export.export(model, (images(2),)).module(), model, 2)


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("test_resnet", "fitted"), ("test_resnet", "average"), ("test_resnet", "covariance"),
     ("test_vit", "backbone")],
)  # fmt: skip
def test_onnx(name, pooling, tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it: pip install onnxscript")
    onnx = pytest.importorskip("onnx", reason="torch.onnx.export needs it: pip install onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs it: pip install onnxruntime")
    model = WithMaps(build(name, pooling=pooling)).eval()
    names = ["embeddings", "feature_maps", "attention"]
    torch.onnx.export(
        model,
        (images(2),),
        tmp_path / "model.onnx",
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=BATCH,
        input_names=["images"],
        output_names=names,
        verbose=False,
    )
    opsets = {o.domain: o.version for o in onnx.load(tmp_path / "model.onnx").opset_import}
    assert opsets[""] == OPSET
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    assert isinstance(session.get_inputs()[0].shape[0], str)  # a name: any number of images
    assert [output.name for output in session.get_outputs()] == names
    for n in (1, 5):
        check(lambda x: session.run(None, {"images": x.numpy()}), model, n)
