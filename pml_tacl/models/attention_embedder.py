"""`AttentionEmbedder`: a backbone, its embedding, and the projection used for retrieval."""

import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors.torch import load_file, save
from timm.models import group_parameters
from torch import Tensor, nn
from torchvision.transforms import v2

from pml_tacl.models.attention_pooling import Embedder, EmbedderOutput
from pml_tacl.models.preprocessing import image_transform, size_in_pixels
from pml_tacl.models.projection import Projection, fit_projection, whiten_linear
from pml_tacl.models.receptive_field import measure_cell_offset, measure_grid
from pml_tacl.models.self_attention import self_attention_map
from pml_tacl.models.trunk import Trunk
from pml_tacl.models.weights import Pretrained, flat_tensors
from pml_tacl.utils.checks import check_number
from pml_tacl.utils.errors import InputError, InputTypeError
from pml_tacl.utils.files import atomic_write

_FORMAT_VERSION = 2
_Self = TypeVar("_Self", bound="AttentionEmbedder")


class AttentionEmbedder(nn.Module):
    """Model that turns images into embeddings of unit norm, feature maps and an attention map.

    `model.trunk` is the backbone, which is *trained*. With the default `pooling="backbone"`,
    `model.embedder` turns its output into the embedding by a projection, which is not trained but
    *fitted*: :meth:`fit_projection` computes it from images without labels. Call it before the
    first search, and again after training. Until it is fitted, the model returns the pooled feature
    of the backbone, which retrieves exactly like `timm.create_model(backbone, num_classes=0)`.

    Trainers and testers of pytorch-metric-learning take the two modules: `embedder(trunk(x))`
    equals `model(x)`.

    Args:
        backbone: a timm model name; a timm module (its head is removed in place); or any module
            that maps images (N, C, H, W) to feature maps (N, C, H, W), or to a list of them, the
            finest first.
        pretrained: False; True to download weights through timm; or the path of a local
            `.safetensors`, `.pth` or `.bin` state dict, with or without classifier.
        embedding_dim: largest number of dimensions of the projected embeddings; None leaves out
            the projection.
        feature_index: the stage (CNN) or block (ViT) whose maps are used for attention; a negative
            number counts from the end. None: the last one with a stride of at most 16 pixels.
        attention: how the attention map is computed. `"border"`: cells that look like the image's
            own border count less. Others are `"relative_border"`, `"pool"`, `"distinctive"`,
            `"none"`, or a module from `TrunkOutput` to (N, H, W) logits; see `Embedder`. None:
            `"border"` for `pooling="backbone"`, `"relative_border"` for `"covariance"`, `"pool"`
            for `"average"`.
        pooling: `"backbone"`, the pooling of timm. For networks trained from scratch:
            `"covariance"` of the maps used for attention (later stages are then removed), or
            `"average"` of the last stage. With these two, the projection is trained.
        freeze_batchnorm: keep the statistics and weights of BatchNorm in the trunk fixed during
            training. None: True if `pretrained` is given.
        **timm_kwargs: passed to `timm.create_model`, such as `in_chans` or `drop_path_rate`. If
            `backbone` is a module, give `in_chans` and `img_size` if they cannot be read from it.

    Raises:
        ValueError: if the backbone is unknown (the message lists similar names) or an argument is
            out of range.
        OSError: if the weights cannot be read or downloaded.

    Example:
        >>> model = AttentionEmbedder("resnet18", embedding_dim=128)
        >>> out = model.forward_features(torch.randn(2, 3, 224, 224))
        >>> out.embeddings.shape, out.feature_maps.shape, out.attention.shape
        (torch.Size([2, 512]), torch.Size([2, 256, 14, 14]), torch.Size([2, 14, 14]))
        >>> model.fit_projection([torch.randn(32, 3, 224, 224)], progress=False)
        >>> model(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        pretrained: Pretrained = False,
        *,
        embedding_dim: int | None = 512,
        feature_index: int | None = None,
        attention: str | nn.Module | None = None,
        pooling: str = "backbone",
        freeze_batchnorm: bool | None = None,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, int) and not isinstance(pretrained, bool):
            raise InputTypeError(
                f"pretrained must be True, False or a path, got {pretrained!r}; dimensions are "
                f"given as embedding_dim={pretrained}"
            )
        if freeze_batchnorm is None:
            freeze_batchnorm = pretrained is not False
        # `recipe_for` reads this: networks from scratch need other settings.
        self.from_scratch = isinstance(backbone, str) and pretrained is False
        self.trunk = Trunk(
            backbone,
            pretrained,
            feature_index=feature_index,
            freeze_batchnorm=freeze_batchnorm,
            stop_at_maps=pooling == "covariance",
            own_pooling=pooling == "backbone",
            **timm_kwargs,
        )
        norm, self.trunk.head_norm = self.trunk.head_norm, None
        channels = (self.trunk.num_features, self.trunk.map_channels)
        self.embedder = Embedder(*channels, embedding_dim, attention, norm, pooling)
        self._config = {
            "backbone": backbone if isinstance(backbone, str) else None,
            "embedding_dim": embedding_dim,
            "feature_index": feature_index,
            "attention": self.embedder.attention_name,
            "pooling": pooling,
            "freeze_batchnorm": freeze_batchnorm,
            "timm_kwargs": timm_kwargs,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Return unit embeddings (N, D) of images (N, C, H, W).

        Until the projection is fitted, D is the number of features of the backbone.
        """
        embeddings: Tensor = self.embedder(self.trunk(images))
        return embeddings

    def forward_features(self, images: Tensor) -> EmbedderOutput:
        """Return embeddings (N, D), feature maps (N, C, H, W) and attention (N, H, W)."""
        output: EmbedderOutput = self.embedder.forward_features(self.trunk(images))
        return output

    def self_attention(self, images: Tensor, block: int = -1) -> Tensor:
        """Return the self-attention of a ViT (N, H, W), which sums to 1.

        See `self_attention_map`.
        """
        return self_attention_map(self.trunk.model, images, block)

    @property
    def data_config(self) -> dict[str, Any]:
        """Return timm's data config.

        Its keys are `input_size`, `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode`.
        """
        return self.trunk.data_config

    def transform(
        self, training: bool = False, image_size: int | tuple[int, int] | None = None
    ) -> v2.Transform:
        """Return the transform from an image to the input of this model.

        Args:
            training: True for a random crop and flip, False for the central crop.
            image_size: side or (height, width) in pixels; None uses the data config.

        Returns:
            A torchvision v2 transform from one image to normalised float32 (C, H, W) on the CPU.
            The image is a PIL image of any mode, or an array or tensor (H, W), (H, W, C) or
            (C, H, W) of uint8, wider integers, or floats in [0, 1]. It is converted by
            :func:`pml_tacl.utils.images.to_rgb`, which also rotates it upright and fills
            transparent areas with white. For a model with 1 channel it is converted to grey. If
            the number of channels C is not 1 or 3, the transform takes PIL images with C channels
            and tensors (C, H, W) of uint8 or floats in [0, 1].
        """
        return image_transform(self.data_config, training, image_size)

    def grid(self, image_size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """Return the height and width of the feature maps, for `SiameseTransform(grid=)`.

        Args:
            image_size: side or (height, width) in pixels; None uses the data config.

        Raises:
            ValueError: if the size is not one or two positive integers, is too small, or is not
                accepted by the backbone.
        """
        return measure_grid(*self._of_images(image_size))

    def cell_offset(
        self,
        image_size: int | tuple[int, int] | None = None,
        *,
        through_weights: bool = False,
    ) -> tuple[float, float]:
        """Return the offset (x, y) of receptive-field centres from their cell centres, in cells.

        The receptive field of a cell is the part of the image that influences it. In most
        convolutional networks its centre is half a cell above and to the left of the centre of the
        cell; in ViTs it is not shifted. Pass the offset to `SiameseTransform`, `BackgroundSwap` and
        `functional.to_image`, which need exact positions. By default, the offset depends only on
        the architecture and the image size, and not on the weights or on random numbers. This
        method runs a forward pass, so call it once and keep the result.

        Args:
            image_size: side or (height, width) in pixels; None uses the data config.
            through_weights: measure the offset with the current weights, by gradients on noise.
                Weights can change it: for EfficientNet-Lite0, the offset is 0.47 of a cell down
                and right by architecture alone, but 0.14 with the ImageNet weights.

        Raises:
            ValueError: if :meth:`grid` does not accept the size.
        """
        images = self._of_images(image_size)
        return measure_cell_offset(*images, through_weights=through_weights)

    def _of_images(self, image_size: Any) -> tuple[Trunk, tuple[int, int], int, int]:
        config = self.data_config
        size, channels = size_in_pixels(config, image_size), config["input_size"][0]
        return self.trunk, size, channels, self.embedder.least_cells

    def fit_projection(
        self,
        batches: Iterable[Tensor | Sequence[Any]],
        max_images: int = 10_000,
        progress: bool = True,
    ) -> None:
        """Fit the projection to images, without labels, in evaluation mode.

        Afterwards the embeddings have at most `embedding_dim` dimensions. One half describes the
        whole image and the other half its parts. Both are whitened, that is, scaled to nearly
        equal variance; see :class:`pml_tacl.models.Projection`. Call this method before the first
        search and again after training. With `pooling="covariance"` or `"average"` it only sets
        the initial values of the projection, which is then trained: call it once, before training.

        Args:
            batches: iterable over images (N, C, H, W) that are ready for the model, or over
                sequences that begin with such images, such as a DataLoader. It is read once, or
                twice with `pooling="covariance"`.
            max_images: largest number of images used. The first ones are taken, so shuffle data
                sets that are sorted.
            progress: show a progress bar.

        Raises:
            ValueError: if the model has no projection, there are fewer than 2 images, features
                are NaN, or all images look the same. The model then keeps its earlier projection.
                Also if `pooling="covariance"` and `batches` is an iterator, which can be read
                only once.
        """
        if isinstance(self.embedder.projection, nn.Linear):
            whiten_linear(self, batches, max_images, progress=progress)
        else:
            fit_projection(self, batches, max_images, progress)

    def reset_projection(self) -> None:
        """Remove the fitted projection: the model returns the embedding of the backbone again."""
        if isinstance(self.embedder.projection, Projection):
            self.embedder.projection.reset()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing on or off: more compute, less memory.

        Raises:
            ValueError: if the backbone does not support it.
        """
        self.trunk.set_grad_checkpointing(enable)

    def parameter_groups(
        self, lr: float, head_lr: float | None = None, layer_decay: float | None = None
    ) -> list[dict[str, Any]]:
        """Return groups of the trainable parameters for any torch optimizer.

        Args:
            lr: learning rate of the trunk; with `layer_decay`, of its last layer.
            head_lr: learning rate of the embedder; None takes `lr`.
            layer_decay: factor in (0, 1] by which the learning rate of each layer is multiplied to
                give that of the layer before it.

        Returns:
            Dicts with `params`, `lr` and `name`; groups without trainable parameters are left out.

        Raises:
            ValueError: if a rate or factor is out of range, or the backbone does not define
                layer groups.
        """
        for name, rate in (("lr", lr), ("head_lr", head_lr)):
            if rate is not None and not rate >= 0:
                raise InputError(f"{name} must be at least 0, got {rate!r}")
        groups: dict[str, dict[str, Any]] = {}
        rates = self._trunk_rates(lr, layer_decay)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                key, rate = rates.get(name, ("embedder", lr if head_lr is None else head_lr))
                group = groups.setdefault(key, {"params": [], "lr": rate, "name": key})
                group["params"].append(parameter)
        return list(groups.values())

    def _trunk_rates(self, lr: float, layer_decay: float | None) -> dict[str, tuple[str, float]]:
        names = [name for name, _ in self.trunk.named_parameters(prefix="trunk")]
        if layer_decay is None:
            return dict.fromkeys(names, ("trunk", lr))
        check_number("layer_decay", layer_decay, 0, most=1, above=True)
        model = self.trunk.model
        if not hasattr(model, "group_matcher"):
            raise InputError(
                f"layer_decay must be None: {type(model).__name__} defines no layer groups"
            )
        matcher = cast(Any, model).group_matcher(coarse=False)
        layers = group_parameters(model, matcher, reverse=True)
        last = max(layers.values(), default=0)
        return {
            f"trunk.model.{name}": (f"trunk layer {layer}", lr * layer_decay ** (last - layer))
            for name, layer in layers.items()
        }

    def save_pretrained(self, folder: str | PathLike[str]) -> Path:
        """Write `model.safetensors` and `config.json` into a folder; create it if needed.

        Raises:
            ValueError: if an argument for timm cannot be written as JSON.
        """
        config = {"format_version": _FORMAT_VERSION, **self._config}
        try:
            text = json.dumps(config, indent=2)
        except TypeError as error:
            raise InputError(f"the arguments for timm cannot be saved as JSON: {error}") from error
        folder = Path(folder)
        with atomic_write(folder / "model.safetensors") as file:
            file.write(save(flat_tensors(self.state_dict())))
        with atomic_write(folder / "config.json") as file:
            file.write(f"{text}\n".encode())
        return folder

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        folder: str | PathLike[str],
        *,
        backbone: nn.Module | None = None,
        attention: nn.Module | None = None,
    ) -> _Self:
        """Load a model that `save_pretrained` wrote, in evaluation mode. Nothing is downloaded.

        Args:
            folder: the folder.
            backbone: the backbone module, if the model was built with one instead of a name.
            attention: the attention module, if the model was built with one instead of a name.

        Raises:
            FileNotFoundError: if the folder contains no saved model.
            ValueError: if it was saved by a newer version, a module is missing, or the weights
                do not fit.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"folder={str(folder)!r} contains no {name}, so it is not a saved model"
                )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        version = config.pop("format_version", None)
        if version == 1:
            config.setdefault("pooling", "average")  # older configs do not name the pooling
            if config["attention"] == "border":
                config["attention"] = "relative_border"
        if not isinstance(version, int) or version > _FORMAT_VERSION:
            raise InputError(
                f"folder={str(folder)!r} has format version {version!r}, but this pml_tacl reads "
                f"versions up to {_FORMAT_VERSION}: upgrade pml_tacl"
            )
        for name, given in (("backbone", backbone), ("attention", attention)):
            saved = config[name]
            if (saved in (None, "module")) == (given is not None):
                continue
            need = f"needs {name}=..." if given is None else f"takes no {name}"
            how = "a module" if given is None else f"{name}={saved!r}"
            raise InputError(f"folder={str(folder)!r} {need}: the model was built with {how}")
        timm_kwargs = config.pop("timm_kwargs")
        config["backbone"] = backbone or config["backbone"]
        config["attention"] = attention or config["attention"]
        model = cls(**config, **timm_kwargs)
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise InputError(f"folder={str(folder)!r}: weights do not fit: {text}") from error
        model.from_scratch = False
        return model.eval()
