"""Boxes and arrows: the embedder, the trainer, the code."""

import torch
from matplotlib.figure import Figure

from figure_parts.strokes import BLUE, GREEN, GREY, INK, RED, arrow, bare, box
from pml_tacl import AttentionEmbedder


def attention_embedder() -> Figure:
    figure = Figure((8.4, 2.7), layout="constrained")
    axes = figure.subplots()
    bare(axes)
    model = AttentionEmbedder("resnet18", 128)
    out = model.forward_features(torch.zeros(1, 3, 224, 224))
    grid = "x".join(map(str, out.feature_maps.shape[1:]))
    box(axes, 0, 1.5, "images\n3x224x224", GREY)
    box(axes, 3, 1.5, "trunk\n(any timm model)")
    box(axes, 6, 1.5, f"feature_maps\n{grid}", GREY)
    box(axes, 9, 0.3, "attention\n14x14, sums to 1", RED)
    box(axes, 9, 2.7, f"covariance\n{model.embedder.projection.in_features}", BLUE)
    box(axes, 12, 2.7, "projection:\n128, unit norm", GREEN)
    for start, end in (
        ((2.2, 1.5), (3, 1.5)),
        ((5.2, 1.5), (6, 1.5)),
        ((8.2, 1.6), (9, 2.6)),
        ((8.2, 1.4), (9, 0.4)),
        ((10.1, 0.8), (10.1, 2.2)),
        ((11.2, 2.7), (12, 2.7)),
    ):
        arrow(axes, start, end, INK)
    axes.set(xlim=(-0.2, 14.4), ylim=(-0.4, 3.4))
    return figure


def unsupervised_trainer() -> Figure:
    figure = Figure((8.4, 3.3), layout="constrained")
    axes = figure.subplots()
    bare(axes)
    box(axes, 0, 3, "every picture,\none plain view", GREY, 2.4)
    box(axes, 3.3, 3, "embed\n(evaluation mode)", BLUE, 2.4)
    box(axes, 6.6, 3, "labeler", BLUE, 2.4)
    box(axes, 9.9, 3, "pseudo-labels,\ncentres", GREEN, 2.4)
    box(axes, 0, 0.6, "batch: clusters x images,\ntwo views each", GREY, 2.9)
    box(axes, 3.8, 0.6, "trunk, embedder", BLUE, 2.2)
    box(axes, 6.9, 0.6, "metric + clustering\n+ attention loss", RED, 2.4)
    box(axes, 10.2, 0.6, "step", BLUE, 1.6)
    for start, end in (
        ((2.4, 3), (3.3, 3)),
        ((5.7, 3), (6.6, 3)),
        ((9, 3), (9.9, 3)),
        ((2.9, 0.6), (3.8, 0.6)),
        ((6, 0.6), (6.9, 0.6)),
        ((9.3, 0.6), (10.2, 0.6)),
    ):
        arrow(axes, start, end, INK)
    arrow(axes, (11, 2.5), (1.4, 1.1), GREEN, connectionstyle="arc3,rad=0.0", lw=1.2)
    arrow(axes, (11, 2.5), (8.4, 1.1), GREEN, lw=1.2)
    axes.text(12.5, 3, "every\nrecluster_every\nepochs", color=INK, va="center", fontsize=8)
    axes.text(12.5, 0.6, "every\niteration", color=INK, va="center", fontsize=8)
    axes.set(xlim=(-0.2, 14.6), ylim=(-0.1, 3.7))
    return figure


def code_map() -> Figure:
    figure = Figure((8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    bare(axes)
    rows = (
        (4.2, RED, "knows no PML", [("visualize", 0), ("functional", 2.7), ("models", 5.4),
                                    ("clustering", 8.1), ("transforms", 10.8)]),
        (2.6, BLUE, "PML's kinds", [("_compat", 0), ("losses, miners", 2.7), ("evaluation", 5.4),
                                    ("datasets", 10.8)]),
        (1.0, GREEN, "the whole", [("trainers", 5.4), ("examples/", 8.1), ("runs, search", 10.8)]),
    )  # fmt: skip
    for y, colour, name, parts in rows:
        axes.text(-0.3, y, name, ha="right", va="center", color=colour)
        for text, x in parts:
            box(axes, x, y, text, colour)
    for start, end in (
        ((2.7, 4.2), (2.2, 4.2)),
        ((4.9, 4.2), (5.4, 4.2)),
        ((3.8, 3.7), (3.8, 3.1)),
        ((2.2, 2.6), (2.7, 2.6)),
        ((4.3, 2.1), (5.6, 1.5)),
        ((6.5, 2.1), (6.5, 1.5)),
        ((8.9, 3.7), (7.2, 1.5)),
        ((11.2, 3.7), (7.6, 1.4)),
        ((7.6, 1), (8.1, 1)),
        ((11.2, 2.1), (10, 1.5)),
        ((10.8, 1), (10.3, 1)),
    ):
        arrow(axes, start, end, GREY)
    axes.set(xlim=(-2.3, 13.2), ylim=(0.3, 4.9))
    return figure
