"""Embeddings in one file: written in parts by all processes, and read without being held."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from pml_tacl.clustering import KMeansPseudoLabeler, pseudo_labels_from
from pml_tacl.clustering.unit_embeddings import UnitRows
from pml_tacl.distributed import inference
from pml_tacl.distributed.inference import embed_distributed
from pml_tacl.distributed.store import EmbeddingFile
from pml_tacl.evaluation import embed
from pml_tacl.trainers import unsupervised_trainer
from pml_tacl.trainers.pseudo_labeling import cluster
from tests.trainers.small import COUNT as IMAGES
from tests.trainers.small import make_trainer

COUNT, D = 23, 5


def images():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(COUNT, 3, 4, 4, generator=generator), torch.arange(COUNT))


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_file_holds_what_memory_would(tmp_path, dtype):
    expected, labels = embed(model(), images(), batch_size=4, progress=False)
    path = tmp_path / "new" / "embeddings.npy"
    found = embed_distributed(
        model(), images(), batch_size=4, progress=False, file=path, dtype=dtype
    )
    assert torch.equal(found[0], expected.to(dtype))
    assert torch.equal(found[1], labels)
    assert np.array_equal(np.load(path), expected.to(dtype).numpy())
    found[0][3] = torch.nan  # it is the file
    assert np.isnan(np.load(path)[3]).all()
    assert [p.name for p in path.parent.iterdir()] == ["embeddings.npy"]


@pytest.mark.parametrize("world", [2, 5, 9])
def test_each_process_writes_its_part(tmp_path, monkeypatch, world):
    """One process plays all of them: the file is made once, and barriers wait for nobody."""
    expected, labels = embed(model(), images(), batch_size=4, progress=False)
    path, mine = tmp_path / "embeddings.npy", []
    for number in range(world):
        for name in ("pml_tacl.distributed.collectives", "pml_tacl.distributed.inference"):
            monkeypatch.setattr(f"{name}.world_size", lambda: world)
        monkeypatch.setattr("pml_tacl.distributed.collectives.rank", lambda n=number: n)
        monkeypatch.setattr(inference, "is_main", lambda n=number: n == 0)
        monkeypatch.setattr(inference, "barrier", lambda: None)
        monkeypatch.setattr(inference, "gather_rows", lambda rows, *_: mine.append(rows))
        monkeypatch.setattr(inference, "run_on_main", lambda make, _, n=number: n or make())
        found = embed_distributed(model(), images(), batch_size=4, progress=False, file=path)
        assert found is None
    assert torch.equal(torch.from_numpy(np.load(path)), expected)
    assert torch.equal(torch.cat(mine).sort().values, labels)


def test_clusters_are_those_of_the_rows_in_memory(tmp_path):
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    file = EmbeddingFile.create(tmp_path / "rows.npy", 200, 8)
    file.write(0, rows[:90])
    file.write(90, rows[90:])
    file.flush()
    expected = KMeansPseudoLabeler(10)(rows)
    for source in (EmbeddingFile(tmp_path / "rows.npy").rows, file.tensor()):
        found = KMeansPseudoLabeler(10, chunk_size=64)(source)
        assert torch.equal(found.labels, expected.labels)


def test_pages_that_were_written_are_let_go_and_stay_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("pml_tacl.distributed.store._WRITTEN_AT_ONCE", 4 * D * 4)
    file, let_go = EmbeddingFile.create(tmp_path / "rows.npy", COUNT, D), []
    release = file._release
    monkeypatch.setattr(file, "_release", lambda: let_go.append(file._held) or release())
    rows = torch.randn(COUNT, D, generator=torch.Generator().manual_seed(0))
    for start in range(0, COUNT, 3):
        file.write(start, rows[start : start + 3])
    assert let_go == [4 * D * count for count in (6, 6, 6, 5)]  # after every second write
    assert torch.equal(file.tensor(), rows)
    assert np.array_equal(np.load(tmp_path / "rows.npy"), rows.numpy())


@pytest.mark.parametrize(
    ("start", "shape"), [(0, (3, D + 1)), (COUNT - 2, (3, D)), (-1, (1, D)), (0, (D,))]
)
def test_rows_that_do_not_fit_are_refused(tmp_path, start, shape):
    file = EmbeddingFile.create(tmp_path / "rows.npy", COUNT, D)
    with pytest.raises(ValueError, match="rows must fit"):
        file.write(start, torch.zeros(shape))
    assert not file.rows.any()


def test_other_files_and_types_are_refused(tmp_path):
    path = tmp_path / "rows.npy"
    with pytest.raises(ValueError, match=r"dtype .*int64"):
        EmbeddingFile.create(path, 3, 2, torch.int64)
    assert not path.exists()
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        EmbeddingFile(path)
    path.write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"rows\.npy"):
        EmbeddingFile(path)


def test_a_training_of_many_images_clusters_from_the_file(tmp_path, monkeypatch):
    plain = make_trainer()
    plain.relabel()
    monkeypatch.setattr(unsupervised_trainer, "IN_MEMORY_UP_TO", IMAGES - 1)
    assert make_trainer()._embedding_pass().file is None  # without a folder there is no place
    trainer = make_trainer(checkpoint_folder=tmp_path)
    trainer.relabel()
    assert torch.equal(trainer.labels, plain.labels)
    assert torch.equal(trainer.embeddings, plain.embeddings)
    assert np.array_equal(np.load(tmp_path / "embeddings.npy"), plain.embeddings.numpy())
    trainer.relabel()  # the file is made anew
    assert torch.equal(trainer.labels, plain.labels)


def test_unreadable_images_are_left_out_without_a_copy(tmp_path, monkeypatch):
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    readable = torch.ones(200, dtype=torch.bool)
    readable[[3, 150]] = False
    rows[~readable] = torch.nan
    file = EmbeddingFile.create(tmp_path / "rows.npy", 200, 8)
    file.write(0, rows)
    expected = KMeansPseudoLabeler(10)(rows[readable])
    sources, read = [], UnitRows._read
    monkeypatch.setattr(
        UnitRows, "_read", lambda self, index: sources.append(self.source) or read(self, index)
    )
    labeler = KMeansPseudoLabeler(10, max_points=198, chunk_size=64)
    labels, centroids = cluster(labeler, file.tensor(), readable, None, tmp_path / "rows.npy")
    assert torch.equal(labels[readable], expected.labels)
    assert labels[~readable].tolist() == [-1, -1]
    assert torch.equal(centroids, expected.centroids)
    assert all(isinstance(source, np.memmap) for source in sources)


def test_a_labeler_of_one_s_own_clusters_the_file(tmp_path):
    class Own(KMeansPseudoLabeler):
        def __call__(self, embeddings, initial_centroids=None):
            assert len(embeddings) == 199
            return pseudo_labels_from(torch.arange(199) % 3, embeddings)

    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    EmbeddingFile.create(tmp_path / "rows.npy", 200, 8).write(0, rows)
    readable = torch.arange(200) != 0
    labels, _ = cluster(Own(3), rows, readable, None, tmp_path / "rows.npy")
    assert labels.tolist() == [-1, *(number % 3 for number in range(199))]
