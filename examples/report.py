"""Write an HTML page about a run, which opens in any browser without a network.

    python examples/report.py runs/quickstart

This is the same as `pml-tacl report`. RUN is a folder that quickstart.py or train_folder.py wrote.
The page shows curves, metrics, the queries with the best and worst results, the attention of the
model, clusters, and a map of the embeddings with zoom.
"""

import sys

from pml_tacl.cli.main import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
