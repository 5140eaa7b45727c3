"""Boxes and arrows: the embedder, the trainer, the code."""

import torch
from matplotlib.figure import Figure

from figure_parts.strokes import BLUE, GREEN, GREY, INK, RED, arrow, bare, box
from pml_tacl import AttentionEmbedder


def attention_embedder() -> Figure:
    figure = Figure((8.4, 2.7), layout="constrained")
    axes = figure.subplots()
    bare(axes)
    model = AttentionEmbedder("resnet18", embedding_dim=128)
    out = model.forward_features(torch.zeros(1, 3, 224, 224))
    grid = "x".join(map(str, out.feature_maps.shape[1:]))
    box(axes, 0, 1.5, "images\n3x224x224", GREY)
    box(axes, 3, 1.5, "trunk\n(any timm model)")
    box(axes, 6, 1.5, f"feature_maps\n{grid}", GREY)
    box(axes, 9, 0.3, "attention\n14x14, sums to 1", RED)
    box(axes, 9, 1.5, f"parts:\ncovariance, {len(model.embedder.projection.parts_mean)}", BLUE)
    box(axes, 9, 2.7, f"whole:\npooled, {model.trunk.num_features}", BLUE)
    box(axes, 12, 2.1, "fitted projection\n128, unit norm", GREEN)
    for start, end in (
        ((2.2, 1.5), (3, 1.5)),
        ((5.2, 1.5), (6, 1.5)),
        ((5.2, 1.8), (9, 2.7)),
        ((8.2, 1.5), (9, 1.5)),
        ((8.2, 1.3), (9, 0.4)),
        ((10.1, 0.75), (10.1, 1.05)),
        ((11.2, 2.7), (12, 2.3)),
        ((11.2, 1.5), (12, 1.9)),
    ):
        arrow(axes, start, end, INK)
    axes.set(xlim=(-0.2, 14.4), ylim=(-0.4, 3.4))
    return figure


def unsupervised_trainer() -> Figure:
    figure = Figure((8.4, 3.3), layout="constrained")
    axes = figure.subplots()
    bare(axes)
    box(axes, 0, 3, "every image,\none plain view", GREY, 2.4)
    box(axes, 3.3, 3, "embed\n(evaluation mode)", BLUE, 2.4)
    box(axes, 6.6, 3, "labeler", BLUE, 2.4)
    box(axes, 9.9, 3, "pseudo-labels,\ncentroids", GREEN, 2.4)
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
