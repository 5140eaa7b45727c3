"""The guard of the package: keep the last network that is not clearly below the best."""

import copy

import torch
from torch import Tensor

from pml_tacl.evaluation.label_free import mutual_neighbours
from pml_tacl.trainers.guard import is_kept
from retrieval_parts.scoring import embed_images
from retrieval_parts.state import Training


@torch.no_grad()
def look(run: Training, embeddings: Tensor | None) -> None:
    """Compute the criterion, and keep the network as `pml_tacl.trainers.guard.Guard` does.

    Args:
        run: a run on photographs; other runs are ignored.
        embeddings: (N, D) of the training images, if already computed.
    """
    config = run.config
    if config.recipe != "photographs" or config.metric != "ms" or config.labels == "true":
        return
    if embeddings is None:
        embeddings = embed_images(run.model, run.images.images, run.views.normalise)
    found = mutual_neighbours(embeddings)
    if run.history and run.history[-1]["step"] == run.step:
        run.history[-1]["mutual"] = found
    else:
        run.history.append({"step": run.step, "mutual": found, "purity": float("nan")})
    if is_kept([at["mutual"] for at in run.history if "mutual" in at]):
        state = copy.deepcopy(run.model.state_dict())
        run.kept = {"step": run.step, "mutual": found, "state": state}
