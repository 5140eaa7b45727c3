"""Find the images of a trained folder that are most like an image, or like each of several.

    python examples/search.py runs/folder QUERY

The same as `pml-tacl search`. RUN is a folder that train_folder.py wrote; QUERY is an image, a
folder of them, or - for what is piped in: an image's bytes, or paths, one in each line. Prints a
table and writes one gallery. With --update the index first follows the folder of images: new and
changed ones are embedded, deleted ones taken out.
"""

from pml_tacl.cli.run_folder import one_line_errors
from pml_tacl.cli.search import main

if __name__ == "__main__":
    with one_line_errors():
        main()
