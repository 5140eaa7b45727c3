"""Write an HTML page about a run, which opens in any browser without a network.

    python examples/report.py runs/quickstart

This is the same as `pml-tacl report`. RUN is a folder that quickstart.py or train_folder.py wrote.
The page shows curves, metrics, the queries with the best and worst results, the attention of the
model, clusters, and a map of the embeddings with zoom.
"""

from pml_tacl.cli.report import main
from pml_tacl.cli.run_folder import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        main()
