"""A batch with noise in it, for every loss and miner."""

import torch

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.tensor([0, -1, 1, 0, 2, 1, -1, 2, 0, 3])
CLEAN = LABELS >= 0
EMBEDDINGS = torch.randn(10, 6, generator=GENERATOR)
CENTROIDS = torch.randn(4, 6, generator=GENERATOR)
MAPS = torch.randn(2, 10, 4, 2, 2, generator=GENERATOR)
POINTS = 2.4 * torch.rand(10, 4, 2, generator=GENERATOR) - 1.2
