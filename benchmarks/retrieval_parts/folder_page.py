"""docs/results.md: retrieval on photographs, from the results of `retrieval.py folders`."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from pml_tacl.utils.errors import InputError
from retrieval_parts.config import PHOTO_METHODS
from retrieval_parts.data import DRAWN
from retrieval_parts.folder_parts import table
from retrieval_parts.page import rows

R1 = "recall_at_1"
Result = dict[str, Any]
_INTRODUCTION = """# Retrieval on photographs

Written by `python benchmarks/retrieval.py folders-page` from `benchmarks/photographs.json`, which \
`python benchmarks/retrieval.py folders ROOT --json benchmarks/photographs.json` makes. The data \
sets are not part of the repository: *grocery* (81 products, photographed in shops by phone; the \
queries are from other shops; github.com/marcusklasson/GroceryStoreDataset, MIT), *clothing* (17 \
garments; the queries are by other photographers; github.com/alexeygrigorev/clothing-dataset, \
CC0), *caltech101* (100 kinds of objects, 40 images each) and *ucmerced* (21 kinds of land use \
from the air). Store each as NAME/CLASS/FILE below ROOT, with the queries' paths in \
NAME/queries.txt.

The network is EfficientNet-Lite0 with ImageNet weights. The classes are split into thirds. A run \
trains on the first third without its labels. Choices were made on the second third. The numbers \
are measured on the last third, after the last step. All methods share network, views, batches \
and steps. The column "seeds" says over how many seeds a row is averaged. There are a tenth as \
many clusters as images.

- `zero_shot`: the backbone's own embedding.
- `+projection`: the projection of `fit_projection`, fitted after training without labels; at \
most 512 dimensions.
- `+averaged`: a weighted mean of the trained and the untrained weights, taken before the \
projection is fitted.
- `+whitened`: the usual PCA whitening of the embedding, without the parts of the image.
- `ms`: k-means with MultiSimilarityLoss. `ccl`, `tac`, `swap`: with the clustering loss, the \
attention loss and the background swap of this package.
- `ntxent`: PML's NTXentLoss on the two views of an image.
- `stml`: our implementation of Kim et al., CVPR 2022.
- `full`: `ms+ccl+tac+swap+averaged+projection` of the network that the guard keeps.
- `supervised`: trained with the labels.
"""

_PARTS = """## What each part is worth: validation, 96 px

Written from `benchmarks/photographs_parts.json`, the results of `python benchmarks/retrieval.py \
folders-parts ROOT --json FILE`. The networks were trained on the training third and measured on \
the validation third, or the other way round (*reverse*). The first row is R@1 with the projection \
and with the mean of the trained and the untrained weights in equal parts. The other rows are \
differences from the first row with the same seeds. The number of seeds is in brackets. \
`tac_temperature=0` is the hard maximum in the attention loss; the default is 0.3. Measured on an \
NVIDIA H200 on 2026-11-26. The images were sent to this machine as WebP with a quality of 94 or \
84, and only runs with the same quality are compared.

The background swap is worth most. The attention loss with a hard maximum costs a little nearly \
everywhere. The reason is probably that its gradient comes from one best match, which is often \
wrong with 6 x 6 cells and impure clusters. A soft maximum (0.3) spreads the gradient over all \
near matches. It gains on each set where it was measured, so it is the default for pretrained \
networks. The contrastive clustering loss changes little on photographs.
"""

_DRAWN = """## Drawings with the defaults for photographs: test, 96 px

`full` in [Retrieval on drawings](results_drawings.md) is trained through the covariance head at a \
learning rate of 1e-3, and uses none of the defaults chosen on photographs. It gives 62.2 on \
openemoji and 42.8 on openemoji-busy. The defaults for pretrained networks, which fit the \
projection after training, give less:
"""

_RAW = """The same differences for the last weights, without averaging and without a projection:
"""

_HISTORY = """## How the defaults were chosen, and what was measured on test before

The choices were made on validation data, also in the other direction (trained on the validation \
third, measured on the training third). The values are R@1 of the projected embeddings.

- **Mean of weights.** With a learning rate of 5e-4, the mean of the untrained and the trained \
weights in equal parts gives 78.6 on clothing and 73.9 on grocery, and the last weights give 77.8 \
and 74.3. In the other direction of clothing, the values are 69.4 and 65.6. With 2e-4, this mean \
gives 83.0 on average over seven measurements, and three quarters of the trained weights give \
82.7. The learning rate was set in between, to 3e-4. With the soft maximum in the attention loss, \
three quarters of the trained weights gave 79.5 instead of 79.2 (clothing in both directions and \
grocery, 3 to 4 seeds each). In the other columns of the table above, they gave the same or up to \
0.3 more. So the share is now three quarters.
- **Whitening of the whole.** The projection describes the whole image and its parts. On averaged \
networks (ten measurements), whitening both gives 81.9, half whitening of the whole 81.5, and no \
whitening of the whole 81.0. On untrained networks (eight measurements), the values are 81.2, 81.1 \
and 81.5.
- **Sizes.** With 128 dimensions for the whole and 384 for the parts, R@1 is 81.4 instead of 81.9 \
on averaged networks, and 81.5 instead of 81.2 on untrained ones. Giving the parts 1.4 times the \
weight costs 0.6 to 1.1 on photographs and gains 4 to 5 on drawings (openemoji-busy).
- **Number of steps** (`folders-parts ROOT --methods ms+ccl+tac+swap --settings steps=200`, one \
seed, three quarters of the trained weights). With 200 instead of 100 steps, R@1 is 80.3 instead \
of 79.0 on grocery, 81.3 instead of 79.7 on clothing, 83.9 instead of 85.4 in the other direction \
of clothing, and 92.2 instead of 93.0 on caltech101. This is 0.15 more on average, in twice the \
time.
- **Number of clusters** (`--settings num_clusters=n/5`). With a fifth instead of a tenth as many \
clusters as images, R@1 is 78.7 instead of 79.0 on grocery and 77.8 instead of 79.7 on clothing \
(one seed).

The test part was also measured before, and nothing was chosen by these measurements. The first \
one had one seed, a learning rate of 2e-4, no mean of weights and no whitening of the whole: \
`full` gave 71.8 on grocery, 67.0 on clothing, 89.4 on caltech101 and 92.3 on ucmerced. Grocery \
and clothing were also measured once (71.7 and 71.3) at 3e-4 before the whole was whitened. Then \
all four sets were measured with half of the trained weights. With the hard maximum (seed 0), \
`full` gave 74.0, 67.9, 90.3 and 92.1 on grocery, clothing, caltech101 and ucmerced. With the soft \
maximum (seeds 0 to 2), it gave 71.6, 68.9, 90.4 and 91.5.
"""


def write(results: Path, parts_of: Path, page: Path) -> None:
    """Write the page.

    Args:
        results: file of `retrieval.py folders`.
        parts_of: file of `retrieval.py folders-parts`; left out if it does not exist.
        page: file that is written.

    Raises:
        InputError: if there are no results.
    """
    if not results.is_file():
        raise InputError(f"--json {results} is not there: run `retrieval.py folders ROOT --json`")
    every: list[Result] = json.loads(results.read_text("utf-8"))
    measured = [one for one in every if one["config"]["split"] == "test"]
    found = [one for one in measured if one["config"]["dataset"] not in DRAWN]
    drawn = [one for one in measured if one["config"]["dataset"] in DRAWN]
    chosen = [one for one in every if one["config"]["split"] == "validation"]
    parts = [_INTRODUCTION]
    for size in sorted({one["config"]["size"] for one in found}):
        group = [one for one in found if one["config"]["size"] == size]
        parts += [f"## R@1 at {size} px", _recalls(group), _answers(group), _guard(group)]
    if chosen:
        parts += ["## What the choices were made on: validation, 96 px", _recalls(chosen)]
        parts.append(_guard(chosen))
    if drawn:
        parts += [_DRAWN, _recalls(drawn)]
    if parts_of.is_file():
        runs: list[Result] = json.loads(parts_of.read_text("utf-8"))
        parts += [_PARTS, table(runs), _RAW, table(runs, "1.0", "raw")]
    parts.append(_HISTORY)
    versions = sorted({", ".join(f"{k} {v}" for k, v in one["versions"].items()) for one in found})
    parts.append("## Made with\n\n" + "\n".join(f"- {version}" for version in versions))
    page.write_text("\n\n".join(part.strip("\n") for part in parts if part) + "\n", "utf-8")


def _of(group: list[Result], method: str, name: str) -> list[float]:
    return [
        100 * one["metrics"][R1]
        for one in group
        if one["config"]["method"] == method and one["config"]["dataset"] == name
    ]


def _seed(one: Result) -> int:
    seed: int = one["config"]["seed"]
    return seed


def _names(group: list[Result]) -> list[str]:
    return sorted({one["config"]["dataset"] for one in group})


def _recalls(group: list[Result]) -> str:
    names, lines = _names(group), []
    for method in PHOTO_METHODS:
        values = [_of(group, method, name) for name in names]
        if any(values):
            means = [mean(v) for v in values if v]
            overall = f"{mean(means):.1f}" if len(means) == len(names) else ""
            seeds = max(len(v) for v in values)
            texts = [f"{mean(v):.1f}" if v else "" for v in values]
            lines.append([f"`{method}`", *texts, overall, str(seeds)])
    return rows(["method", *names, "mean", "seeds"], lines)


def _answers(group: list[Result]) -> str:
    """What `full` gives over each of the others, and how much of the gap to labels it closes."""
    names, lines = _names(group), []
    for method in PHOTO_METHODS:
        pairs = [(_of(group, "full", n), _of(group, method, n)) for n in names]
        if method == "full" or not all(a and b for a, b in pairs):
            continue
        gains = [mean(a) - mean(b) for a, b in pairs]
        lines.append([f"`{method}`", *(f"{gain:+.1f}" for gain in gains), f"{mean(gains):+.1f}"])
    if not lines:
        return ""
    text = "R@1 of `full` minus that of each other method, in points:\n\n"
    text += rows(["method", *names, "mean"], lines)
    ends = [_of(group, m, n) for n in names for m in ("zero_shot", "full", "supervised+projection")]
    if all(ends):
        low, full, high = (mean(mean(v) for v in ends[i::3]) for i in range(3))
        text += (
            f"\n\nOn average `full` closes {100 * (full - low) / (high - low):.0f} % of the gap "
            "between the backbone's own embedding and `supervised+projection`."
        )
    return text


def _guard(group: list[Result]) -> str:
    lines = [
        [
            one["config"]["dataset"],
            str(_seed(one)),
            *(f"{100 * at['mutual']:.1f}" for at in (one["history"][0], one["history"][-1])),
            str(one["kept"]["step"]),
            f"{100 * one['metrics'][R1]:.1f}",
            *(
                f"{mean(v):.1f}" if (v := _of(others, method, one["config"]["dataset"])) else ""
                for others, method in (
                    (
                        [other for other in group if _seed(other) == _seed(one)],
                        "ms+ccl+tac+swap+projection",
                    ),
                    (group, "zero_shot+projection"),
                )
            ),
        ]
        for one in sorted(group, key=lambda one: (one["config"]["dataset"], _seed(one)))
        if "kept" in one
    ]
    if not lines:
        return ""
    heads = ["set", "seed", "mutual at the start", "at the end", "kept step", "R@1 `full`"]
    heads += ["R@1 of the last weights", "R@1 untrained"]
    return (
        "What the guard kept: the percentage of mutual neighbours among the training images at the "
        "start and at the end, the step of the network that was kept, and R@1 of `full`, of the "
        "last weights and of the untrained weights, each with its own projection.\n\n"
        + rows(heads, lines)
    )
