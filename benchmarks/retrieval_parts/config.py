"""Configuration of a run as a flat, hashable record, and the methods by name."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pml_tacl.trainers.recipe import PRETRAINED
from pml_tacl.utils.errors import InputError

# Increase this if a change of data or training makes earlier results invalid.
RESULTS_VERSION = 3
# The parts of the full method as fields of Config. Their weights are set only here.
PARTS: dict[str, dict[str, Any]] = {
    "head": {"attention": "relative_border", "pooling": "covariance"},
    "ccl": {"ccl": 0.5, "ccl_momentum": 0.0},
    "tac": {"tac": 3.0},
    "swap": {"swap": 0.7},
}


def _method(*parts: str, **other: Any) -> dict[str, Any]:
    return {key: value for part in parts for key, value in PARTS[part].items()} | other


# Settings of each method. All other settings are the same for all methods.
METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {"steps": 0},
    "zero_shot+head": _method("head", steps=0),
    "ms": {},
    "full": _method("ccl", "tac", "head", "swap"),
    "supervised": {"labels": "true"},
    "ms+tac+head+swap": _method("tac", "head", "swap"),
    "ms+ccl+head+swap": _method("ccl", "head", "swap"),
    "ms+ccl+tac+head": _method("ccl", "tac", "head"),
    "ntxent": {"metric": "ntxent"},
    "ntxent+swap": _method("swap", metric="ntxent"),
    "stml": {"metric": "stml"},
    "stml+swap": _method("swap", metric="stml"),
    # Other combinations of the parts.
    "ms+ccl+tac+swap": _method("ccl", "tac", "swap"),
    "ms+head": _method("head"),
    "ccl+tac+head+swap": _method("ccl", "tac", "head", "swap", metric="none"),
    "supervised+head": _method("head", labels="true"),
    "ntxent+head+swap": _method("head", "swap", metric="ntxent"),
    "stml+head+swap": _method("head", "swap", metric="stml"),
    # The two losses of the paper, without our additions.
    "ms+swap": _method("swap"),
    "ms+ccl": _method("ccl"),
    "ms+tac": _method("tac"),
    "ms+ccl+tac": _method("ccl", "tac"),
    "ccl": _method("ccl", metric="none"),
    "ccl+tac": _method("ccl", "tac", metric="none"),
}
# Main methods of the benchmark, measured first and for every seed.
FIRST = tuple(METHODS)[: tuple(METHODS).index("ms+ccl+tac+swap")]
REGIMES = ("scratch", "pretrained")
# Photographs: the package's own recipe. `+averaged` measures the mean of trained and untrained
# weights, `+projection` fits it after training, `full` does both for what the guard keeps. Methods
# that differ in these alone share a training.
_AFTERWARDS = ("after", "averaged", "guard")
_WEIGHTS = PRETRAINED.loss_weights
_CCL = {"ccl": _WEIGHTS["clustering_loss"], "ccl_momentum": PRETRAINED.centroid_momentum}
_TAC = {
    "tac": _WEIGHTS["attention_loss"],
    "tac_temperature": PRETRAINED.attention_temperature or 0.0,
}
_SWAP = {"swap": PRETRAINED.swap}
_TRAINED: dict[str, dict[str, Any]] = {
    "zero_shot": {"steps": 0},
    "ms": {},
    "stml": {"metric": "stml"},
    "ntxent": {"metric": "ntxent"},
    "ms+ccl+tac+swap": _CCL | _TAC | _SWAP,
    "ms+tac+swap": _TAC | _SWAP,
    "ms+ccl+swap": _CCL | _SWAP,
    "ms+ccl+tac": _CCL | _TAC,
    "ms+swap": _SWAP,
    "supervised": {"labels": "true"},
}
PHOTO_METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": _TRAINED["zero_shot"],
    "zero_shot+whitened": {"steps": 0, "after": "whitened"},
    **{f"{name}+projection": {**s, "after": "projection"} for name, s in _TRAINED.items()},
    **{
        f"{name}+averaged+projection": {**s, "after": "projection", "averaged": True}
        for name, s in _TRAINED.items()
        if name != "zero_shot"
    },
    **{name: settings for name, settings in _TRAINED.items() if name != "zero_shot"},
    "full": {
        **_TRAINED["ms+ccl+tac+swap"],
        "after": "projection",
        "averaged": True,
        "guard": True,
    },
}
RECIPES = ("drawings", "photographs")


@dataclass(frozen=True)
class Config:
    """Configuration of a run. Fields at -1 or "auto" are set by `resolved`."""

    dataset: str = "openemoji-busy"
    regime: str = "pretrained"
    recipe: str = "drawings"  # "photographs": the defaults of the package
    after: str = "none"  # fitted after training: "projection", or "whitened" (only its whole)
    averaged: bool = False  # measured at the mean of the trained and the untrained weights
    guard: bool = False  # measure the network that the guard keeps, which may be the untrained one
    method: str = "ms"
    split: str = "validation"
    seed: int = 0
    steps: int = -1
    size: int = -1
    limit: int = -1  # classes of each split, for short runs; -1 is all

    # Model and optimiser.
    embedding_dim: int = -1  # 0 builds no projection
    attention: str = "none"
    pooling: str = "average"
    whiten: bool = True  # initialise the projection of covariance pooling by whitening
    feature_index: int = -1  # stage of attention's maps, -1: stride 16, 8 on 64 pixels
    lr: float = -1.0
    weight_decay: float = 1e-2
    schedule: str = "onecycle"  # or "constant"
    batch: int = 64

    # Labels of the metric losses and of CCL: clusters, or the true labels (the upper bound).
    labels: str = "clusters"
    num_clusters: str = "classes"  # or a number, "auto" (a tenth), "2classes"
    recluster: int = -1  # steps between clusterings
    warmup: int = -1  # steps before the first, each image its own cluster
    per_cluster: int = 4
    max_ambiguity: float = 0.0  # >0: noise if own centroid / next centroid distance is above it

    metric: str = "ms"  # ms, ntxent, stml or none
    miner: str = "none"  # or ms: PML's MultiSimilarityMiner
    ccl: float = 0.0
    ccl_margin: float = 0.2
    ccl_negatives: int = 5
    ccl_momentum: float = 1.0  # momentum of the centroids, which follow the batches; 1 keeps them
    tac: float = 0.0
    tac_temperature: float = 0.0  # 0 is the hard maximum
    tac_pairs: int = 1
    tac_masked: bool = True  # under a swap count only cells that were kept

    swap: float = 0.0  # share of views
    mask: str = "border"  # or centred, or a name in masks.MASKS
    empty: bool = True
    sharpness: float = 4.0
    sigma: float = 0.25
    # "first": masks from the network at the start and at the first clustering; "recluster": also at
    # each later clustering.
    mask_from: str = "first"
    mask_index: int = -1  # stage of the mask's maps; -1 is feature_index's
    mask_size: int = 1  # factor by which images are enlarged to compute masks
    mask_references: int = 64

    ema: float = 0.0  # momentum of a teacher that computes clusters and masks; 0 is none
    evaluate_teacher: bool = False
    views: str = "default"
    cell_offset: bool = False  # align points and masks to receptive-field centres

    ntxent_temperature: float = 0.1
    stml_sigma: float = 3.0
    stml_delta: float = 1.0
    stml_neighbours: int = 10
    stml_momentum: float = 0.999

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise InputError(f"recipe={self.recipe!r} is none of {', '.join(RECIPES)}")
        known = PHOTO_METHODS if self.recipe == "photographs" else METHODS
        if self.method not in known:
            raise InputError(f"method={self.method!r} is none of {', '.join(known)}")
        if self.regime not in REGIMES:
            raise InputError(f"regime={self.regime!r} is none of {', '.join(REGIMES)}")

    @property
    def resolved(self) -> "Config":
        """Return the configuration with all automatic fields filled in."""
        if self.recipe == "photographs":
            return self._as_photographs()
        scratch = self.regime == "scratch"
        small = scratch or self.dataset == "glyphs"
        steps = (300 if scratch else 60) if self.steps < 0 else self.steps
        steps = 0 if self.method.startswith("zero_shot") else steps
        warmup = (steps // 2 if scratch else 0) if self.warmup < 0 else self.warmup
        plain = 128 if scratch else 0
        filled = {
            "steps": steps,
            "size": (64 if small else 96) if self.size < 0 else self.size,
            "embedding_dim": (plain if self.pooling == "average" else 512)
            if self.embedding_dim < 0
            else self.embedding_dim,
            "feature_index": 2 if scratch and self.feature_index < 0 else self.feature_index,
            "lr": (5e-3 if scratch else 1e-3) if self.lr < 0 else self.lr,
            "recluster": max(1, (steps - warmup) // 3) if self.recluster < 0 else self.recluster,
            "warmup": warmup,
        }
        return replace(self, **filled)

    def _as_photographs(self) -> "Config":
        filled = {
            "size": 96 if self.size < 0 else self.size,
            "pooling": "backbone",
            "attention": "border",
            "embedding_dim": 512 if self.embedding_dim < 0 else self.embedding_dim,
            "lr": PRETRAINED.learning_rate if self.lr < 0 else self.lr,
            "num_clusters": "auto" if self.num_clusters == "classes" else self.num_clusters,
            "warmup": max(0, self.warmup),
        }
        return replace(self, **filled)

    def for_count(self, count: int) -> "Config":
        """Return the configuration with open numbers of steps set for `count` images."""
        config = self.resolved
        if config.recipe != "photographs":
            return config
        steps = PRETRAINED.steps(count) if config.steps < 0 else config.steps
        recluster = max(1, -(-steps // 3)) if config.recluster < 0 else config.recluster
        return replace(config, steps=steps, recluster=recluster)

    @property
    def key(self) -> str:
        """Return sixteen hexadecimal digits that identify the configuration."""
        text = json.dumps([RESULTS_VERSION, asdict(self.resolved)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make(method: str, **changes: Any) -> Config:
    """Return the configuration of a method by name, with changes."""
    photographs = changes.get("recipe") == "photographs"
    settings = (PHOTO_METHODS if photographs else METHODS).get(method, {})
    return Config(method=method, **{**settings, **changes})


def of_one_training(config: Config) -> list[Config]:
    """Return the configurations of photographs that share the training of `config`, itself first.

    They differ only in the steps after training.
    """
    if config.recipe != "photographs":
        return [config]

    def trained(settings: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in settings.items() if k not in _AFTERWARDS}

    defaults = {field.name: field.default for field in fields(Config) if field.name in _AFTERWARDS}
    own = trained(PHOTO_METHODS[config.method])
    others = [
        replace(
            config,
            method=name,
            **(defaults | {k: v for k, v in settings.items() if k in _AFTERWARDS}),
        )
        for name, settings in PHOTO_METHODS.items()
        if name != config.method and trained(settings) == own
    ]
    return [config, *others]


def parse(settings: list[str]) -> dict[str, Any]:
    """Parse `name=value` pairs of a command line as fields of Config.

    Raises:
        ValueError: for an unknown field or a value of another type.
    """
    types = {field.name: field.type for field in fields(Config)}
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in types:
            raise InputError(f"{setting!r} must be one of {', '.join(types)}, =, and a value")
        kind = types[name]
        if kind is bool:
            if value.lower() not in ("true", "false"):
                raise InputError(f"{name} must be true or false, got {value!r}")
            found[name] = value.lower() == "true"
        else:
            found[name] = kind(value)  # type: ignore[operator]
    return found
