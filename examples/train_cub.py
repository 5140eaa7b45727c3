"""Train on 100 species of birds (CUB-200-2011) without labels, and test on the other 100.

python examples/train_cub.py data/cub
"""

from train_benchmark import main

from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import CUB

CONFIG = {
    "num_clusters": 100,
    "images_per_cluster": 5,
    "test_splits": ["test"],
    "metrics": ["recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "NMI"],
}

if __name__ == "__main__":
    with runs.one_line_errors():
        main(CUB, CONFIG, __doc__)
