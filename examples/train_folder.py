"""Train an embedding on a folder of images without labels, and index the images.

    python examples/train_folder.py IMAGES --backbone resnet50
    torchrun --nproc-per-node 4 -- examples/train_folder.py IMAGES --batch-size 128

This is the same as `pml-tacl train`. The script writes to runs/folder/: the model, embeddings.npy,
files.json and index.faiss for search.py, metrics.json, figures, records, and the last
checkpoints.
"""

import sys

from pml_tacl.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
