"""Images for processes that read them, which import nothing but torch for that."""

import time

import torch
from torch.utils.data import Dataset

COUNT = 24


class SlowImages(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        time.sleep(0.15)  # longer in all than a reader looks for its parent
        return torch.zeros(3, 8, 8), index
