"""Train on In-shop clothes (DeepFashion) without labels, and test with queries of other items.

python examples/train_inshop.py data/inshop
"""

from train_benchmark import main

from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import InShop

CONFIG = {
    "num_clusters": 4000,  # about six images per cluster
    "images_per_cluster": 2,
    "test_splits": ["query", "gallery"],
    "metrics": [f"recall_at_{k}" for k in (1, 10, 20, 30)],
}

if __name__ == "__main__":
    with runs.one_line_errors():
        main(InShop, CONFIG, __doc__)
