"""The drawings of the documentation, into docs/images/parts/.

    python docs/figures.py [FOLDER]

Each is computed by the package itself wherever it shows a value, so that an image cannot tell
another story than the code.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from figure_parts.diagrams import attention_embedder, unsupervised_trainer
from figure_parts.strokes import (
    BLUE,
    GREEN,
    GREY,
    INK,
    RED,
    arrow,
    bare,
    clusters,
    make_images,
    on_circle,
)
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from torchvision.transforms import v2

from pml_tacl import (
    AttentionConsistencyMiner,
    BackgroundSwap,
    ContrastiveClusteringMiner,
    KMeansPseudoLabeler,
    RetrievalCalculator,
    SiameseTransform,
)
from pml_tacl.functional import contrastive_clustering

STYLE = {
    "figure.facecolor": "white",  # legible on the dark theme too
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def contrastive_clustering_loss() -> Figure:
    figure = Figure((8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    points, labels, centroids = clusters()
    bare(left, "its own centroid, and the 2 nearest others\n")
    left.add_patch(Circle((0, 0), 1, fill=False, color=GREY, lw=0.6))
    left.scatter(*points.T, s=9, c=[f"C{label}" for label in labels], alpha=0.45)
    left.scatter(*centroids.T, s=110, marker="*", c=[f"C{k}" for k in range(5)], zorder=3)
    image = points[np.argmin(np.abs(points - on_circle(45)).sum(1))]
    left.scatter(*image, s=45, c=INK, zorder=4)
    left.annotate("$e_i$", image, xytext=(8, 6), textcoords="offset points")
    for k, colour in ((0, GREEN), (1, RED), (4, RED)):
        arrow(left, image, centroids[k], colour, lw=1.6, shrinkB=7)
    left.annotate("$c_{y_i}$: pulled", centroids[0], (1.12, 0.2), color=GREEN)
    left.annotate("pushed", centroids[1], (-0.22, 1.08), color=RED)
    left.annotate("pushed", centroids[4], (0.6, -1.02), color=RED)
    left.set_xlim(-1.1, 1.7)
    gap = torch.linspace(-1, 1, 201)
    for margin, style in ((0.0, ":"), (0.2, "-"), (0.5, "--")):
        losses = contrastive_clustering(gap, torch.zeros(201, 1), margin)
        right.plot(gap, losses, style, color=BLUE, label=f"margin {margin}")
    right.axvline(0, color=GREY, lw=0.6)
    right.set_xlabel("distance to the own centroid − mean distance to the others")
    right.set_ylabel("loss of one embedding")
    right.legend(frameon=False)
    return figure


def attention_consistency_loss() -> Figure:
    figure = Figure((8.4, 2.7), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    image = make_images(1)[0]
    torch.manual_seed(3)
    siamese = SiameseTransform(
        96, 4, crop_scale=None, geometric=v2.RandomAffine((25, 25), (0.08, 0.08), fill=220),
        photometric=None, flip=False, mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    view, moved, points = siamese(torch.from_numpy(image).permute(2, 0, 1))
    cells = np.stack(np.meshgrid(*[(np.arange(4) + 0.5) / 4 * 96] * 2), -1).reshape(-1, 2)
    places = (points.numpy() + 1) / 2 * 96
    for axes, shown, dots, title in (
        (first, view, cells, "view $i$: the cells $u$"),
        (second, moved, places, "transformed view $i'$: where each lies, $T u$"),
    ):
        bare(axes, title)
        axes.imshow(shown.permute(1, 2, 0))
        inside = ((dots >= 0) & (dots <= 96)).all(1)
        axes.scatter(*dots[inside].T, s=22, c=np.arange(16)[inside], cmap="turbo", ec="white")
        axes.set(xlim=(0, 96), ylim=(96, 0))
    bare(third, "what must agree, for a matched image $j$")
    third.set(xlim=(0, 10), ylim=(0, 10))
    for y, text, colour in (
        (7.6, "$A(i|j)[u]$\nhow well place $u$ of $i$\nis found anywhere in $j$", BLUE),
        (2.4, "$A(i'|j)[T u]$\nthe same place, seen\nafter the transform", GREEN),
    ):
        third.add_patch(
            FancyBboxPatch((0.6, y - 1.5), 6.4, 3, boxstyle="round,pad=0.2", fc="none", ec=colour)
        )
        third.text(3.8, y, text, ha="center", va="center", color=INK)
    arrow(third, (8.2, 7.6), (8.2, 2.4), RED, arrowstyle="<|-|>", lw=1.5)
    third.text(8.5, 5, "squared\ndifference", color=RED, va="center")
    third.set_xlim(0, 11.5)
    return figure


def contrastive_clustering_miner() -> Figure:
    figure = Figure((8.4, 3.4), layout="constrained")
    points, labels, centroids = clusters(4)
    points[[8, 9]] = on_circle([43, 52])
    embeddings = torch.from_numpy(points).float()
    for axes, ambiguity in zip(figure.subplots(1, 2), (1.0, 0.3), strict=True):
        miner = ContrastiveClusteringMiner(num_negatives=1, max_ambiguity=ambiguity)
        miner.set_centroids(torch.from_numpy(centroids).float())
        a1, _, a2, n = miner(embeddings, torch.from_numpy(labels))
        kept = np.isin(np.arange(35), torch.cat([a1, a2]).numpy())
        bare(axes, f"max_ambiguity={ambiguity}: {int((~kept).sum())} of 35 images left out")
        axes.add_patch(Circle((0, 0), 1, fill=False, color=GREY, lw=0.6))
        for i, j in zip(a2.tolist()[::5], n.tolist()[::5], strict=True):
            axes.plot(*points[[i, j]].T, color=RED, lw=0.3, alpha=0.5)
        colours = np.array([f"C{label}" for label in labels])
        axes.scatter(*points[kept].T, s=22, c=colours[kept], zorder=3)
        axes.scatter(*points[~kept].T, s=30, marker="x", c=INK, zorder=4)
        axes.scatter(*(1.13 * centroids).T, s=90, marker="*", c=[f"C{k}" for k in range(5)])
    return figure


def attention_consistency_miner() -> Figure:
    shown = make_images(4, seed=2)
    order = [0, 2, 1, 4, 3, 5]
    labels = torch.tensor([0, 1, 0, 2, 1, 2])
    maps = torch.from_numpy(shown[order]).permute(0, 3, 1, 2).float()
    pairs = AttentionConsistencyMiner()(maps, labels)
    figure = Figure((8.4, 2.5), layout="constrained")
    axes = figure.subplots()
    bare(axes, "each image with the one of its own cluster that is most alike")
    for i, image in enumerate(shown[order]):
        axes.imshow(image, extent=(1.3 * i, 1.3 * i + 1, 0, 1))
        axes.add_patch(
            Rectangle((1.3 * i, 0), 1, 1, fill=False, ec=f"C{int(labels[i])}", lw=3, zorder=3)
        )
        axes.text(1.3 * i + 0.5, -0.2, f"cluster {int(labels[i])}", ha="center", color=INK)
    for i, j in zip(pairs[0].tolist(), pairs[1].tolist(), strict=True):
        start, end = ((1.3 * k + 0.5, 1.02) for k in (i, j))
        colour = f"C{int(labels[i])}"
        arrow(axes, start, end, colour, connectionstyle=f"arc3,rad={-0.25 if i < j else 0.25}")
    axes.set(xlim=(-0.1, 7.6), ylim=(-0.4, 2.1))
    return figure


def kmeans_pseudo_labeler() -> Figure:
    figure = Figure((8.4, 3.2), layout="constrained")
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 60)
    angles = np.array([10, 100, 190, 280])[labels] + rng.normal(0, 16, 240)
    embeddings = torch.from_numpy(on_circle(angles)).float()
    for axes, number in zip(figure.subplots(1, 3), (2, 4, 12), strict=True):
        found = KMeansPseudoLabeler(number)(embeddings)
        members = torch.bincount(found.labels * 4 + torch.from_numpy(labels), minlength=number * 4)
        purity = members.view(-1, 4).amax(1).sum() / 240
        bare(axes, f"num_clusters={number}: purity {purity:.2f}")
        radius = 1 + 0.12 * rng.random((240, 1))
        points = embeddings.numpy() * radius
        axes.scatter(*points.T, s=7, c=found.labels, cmap="tab20")
        axes.scatter(*(0.85 * found.centroids).T, s=70, marker="*", c=range(number), cmap="tab20")
    return figure


def siamese_transform() -> Figure:
    figure = Figure((8.4, 2.5), layout="constrained")
    image = torch.from_numpy(make_images(1)[0]).permute(2, 0, 1)
    kinds = {
        "first view": None,
        "crop and flip": None,
        "affine": v2.RandomAffine(30, (0.1, 0.1), (0.8, 1.2), 10, fill=220),
        "perspective": v2.RandomPerspective(0.5, 1.0, fill=220),
        "elastic": v2.ElasticTransform(80.0, 6.0, fill=220),
    }
    for axes, (name, geometric) in zip(figure.subplots(1, 5), kinds.items(), strict=True):
        torch.manual_seed(5)
        transform = SiameseTransform(
            96, 6, crop_scale=(0.6, 1), geometric=geometric, photometric=None, mean=(0, 0, 0),
            std=(1, 1, 1),
        )  # fmt: skip
        view, moved, points = transform(image)
        places = (points.numpy() + 1) / 2 * 96
        if name == "first view":
            moved = view
            places = np.stack(np.meshgrid(*[(np.arange(6) + 0.5) / 6 * 96] * 2), -1).reshape(-1, 2)
        bare(axes, name)
        axes.imshow(moved.permute(1, 2, 0).clamp(0, 1))
        inside = ((places >= 0) & (places <= 96)).all(1)
        axes.scatter(
            *places[inside].T, s=9, c=np.arange(36)[inside], cmap="turbo", ec="white", lw=0.3
        )
        axes.set(xlim=(0, 96), ylim=(96, 0))
    return figure


def background_swap() -> Figure:
    figure = Figure((8.4, 2.9), layout="constrained")
    shown = torch.from_numpy(make_images(2, seed=4)[[0, 2]]).permute(0, 3, 1, 2).float() / 255
    tinted = shown * torch.tensor([[0.75, 0.9, 1], [1, 0.85, 0.7]]).view(2, 3, 1, 1)
    swapped, masks, _ = BackgroundSwap(1.0, "centred")(
        tinted, generator=torch.Generator().manual_seed(0)
    )
    panels = [(tinted[0], "$x$"), (tinted[1], "$x_{other}$"), (masks[0], "mask $m$"),
              (swapped[0], "$m x + (1-m) x_{other}$")]  # fmt: skip
    for axes, (image, title) in zip(figure.subplots(1, 4), panels, strict=True):
        bare(axes, title)
        if image.ndim == 3:
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1))
        else:
            axes.imshow(image, cmap="gray", vmin=0, vmax=1)
    return figure


def retrieval_calculator() -> Figure:
    right = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]])
    figure = Figure((8.4, 2.3), layout="constrained")
    axes = figure.subplots()
    bare(axes, "three queries, their ranking, three right answers each")
    # Each query as a problem of its own: a gallery on a line, nearest first.
    names = ("recall_at_1", "recall_at_2", "recall_at_4", "r_precision",
             "mean_average_precision_at_r", "mean_reciprocal_rank")  # fmt: skip
    calculator = RetrievalCalculator(include=names, ks=(1, 2, 4), device=torch.device("cpu"))
    for row, hits in enumerate(right):
        y = 2 - row
        axes.text(-0.4, y, f"query {row + 1}", ha="right", va="center", color=INK)
        for rank, hit in enumerate(hits.tolist()):
            axes.add_patch(Rectangle((rank, y - 0.4), 0.85, 0.8, fc=GREEN if hit else "#dddddd"))
            axes.text(rank + 0.42, y, str(rank + 1), ha="center", va="center", color=INK)
        found = calculator.get_accuracy(
            torch.zeros(1, 1), torch.ones(1), torch.arange(1.0, 7)[:, None], hits
        )
        for column, name in enumerate(names):
            axes.text(7.4 + 1.8 * column, y, f"{found[name]:.2f}", ha="center", va="center")
    for column, name in enumerate(("R@1", "R@2", "R@4", "R-prec.", "MAP@R", "MRR")):
        axes.text(7.4 + 1.8 * column, 2.75, name, ha="center", color=INK)
    axes.set(xlim=(-2, 17.4), ylim=(-0.5, 3.1))
    return figure


DRAWINGS = (
    contrastive_clustering_loss,
    attention_consistency_loss,
    contrastive_clustering_miner,
    attention_consistency_miner,
    attention_embedder,
    kmeans_pseudo_labeler,
    siamese_transform,
    background_swap,
    unsupervised_trainer,
    retrieval_calculator,
)


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parent / "images" / "parts")
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for draw in DRAWINGS:
            draw().savefig(
                folder / f"{draw.__name__}.png",
                dpi=110,
                bbox_inches="tight",
                metadata={"Software": None},
            )


if __name__ == "__main__":
    main()
