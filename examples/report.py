"""Write one HTML page of a run, to be looked at in any browser, without a network.

    python examples/report.py runs/quickstart

The same as `pml-tacl report`. RUN is a folder that quickstart.py or train_folder.py wrote. The page
shows its curves and metrics, the queries that retrieve best and worst, what the model attends to,
clusters, and a map of the embeddings to zoom into.
"""

from pml_tacl.cli.report import main
from pml_tacl.cli.run_folder import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        main()
