"""Train on 11318 of the Stanford Online Products without labels, and test on the others.

python examples/train_sop.py data/sop
"""

from train_benchmark import main

from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import StanfordOnlineProducts

CONFIG = {
    "num_clusters": 10_000,  # about six images per cluster
    "images_per_cluster": 2,
    "test_splits": ["test"],
    "metrics": [f"recall_at_{k}" for k in (1, 10, 100, 1000)],
}

if __name__ == "__main__":
    with runs.one_line_errors():
        main(StanfordOnlineProducts, CONFIG, __doc__)
