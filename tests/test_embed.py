"""Embedding data sets that give other than they say: an error, never made-up rows."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from pml_tacl.evaluation import embed, evaluate


class Stream(IterableDataset):
    """Says one length and gives another number of items."""

    def __init__(self, length, gives):
        self.length, self.gives = length, gives

    def __len__(self):
        return self.length

    def __iter__(self):
        return ((torch.full((4,), float(i)), i % 2) for i in range(self.gives))


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (7, "dataset gives 7 items and its length is 10"),
        (0, "dataset gives 0 items and its length is 10"),
        (11, "dataset gives more items than its length, 10"),
        (12, "dataset gives more items than its length, 10"),
    ],
)
def test_a_length_that_is_off_is_an_error(batch_size, gives, message):
    with pytest.raises(ValueError, match=message):
        embed(nn.Identity(), Stream(10, gives), batch_size=batch_size, progress=False)
    with pytest.raises(ValueError, match=message):
        evaluate(nn.Identity(), Stream(10, gives), batch_size=batch_size, progress=False)


def test_an_iterable_data_set_is_embedded_in_its_order():
    embeddings, labels = embed(nn.Identity(), Stream(10, 10), batch_size=4, progress=False)
    assert embeddings[:, 0].tolist() == list(range(10))
    assert labels.tolist() == [0, 1] * 5


def test_workers_would_give_the_items_of_an_iterable_data_set_again():
    with pytest.raises(ValueError, match="num_workers must be 0 for an iterable data set, got 2"):
        embed(nn.Identity(), Stream(10, 10), num_workers=2, progress=False)


def test_a_data_set_needs_a_length():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="dataset must have a length, and Endless has none"):
        embed(nn.Identity(), Endless(), progress=False)


X = torch.ones(4)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.ones(2, 2), r"must be \(1,\) or \(1, levels\) whole numbers, got shape \(1, 2, 2\)"),
        ("cat", r"must be whole numbers, got 'cat' \(str\): number the classes"),
        ({"id": 1}, r"must be whole numbers, got {'id': 1} \(dict\): number the classes"),
    ],
)
def test_labels_that_are_no_whole_numbers_are_an_error(label, message):
    with pytest.raises(ValueError, match=f"labels of dataset {message}"):
        embed(nn.Identity(), Items((X, label)), progress=False)


@pytest.mark.parametrize("label", [(1, 2), [1, 2], torch.tensor([1, 2])])
def test_labels_of_two_levels(label):
    _, labels = embed(nn.Identity(), Items((X, label), (X, label)), progress=False)
    assert labels.tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([X, X], r"\(image, label\) pairs: wrap"),
        ([(X, 0, 0), (X, 1, 1)], r"\(image, label\) pairs: wrap"),
        ([{"image": X, "label": 0}], r"\(image, label\) pairs: wrap"),
        ([((X, X), 0)], "a batch of images came as list"),  # two views
        ([("a.png", 0)], "a batch of images came as list"),
    ],
)
def test_items_of_another_form_are_an_error(items, message):
    with pytest.raises(TypeError, match=message):
        embed(nn.Identity(), Items(*items), progress=False)
