"""Train on 98 car models (Stanford Cars) without labels, and test on the other 98.

python examples/train_cars.py data/cars
"""

import train_cub
from train_benchmark import main

from pml_tacl.cli import run_folder as runs
from pml_tacl.datasets import Cars196

CONFIG = {**train_cub.CONFIG, "num_clusters": 98}

if __name__ == "__main__":
    with runs.one_line_errors():
        main(Cars196, CONFIG, __doc__)
