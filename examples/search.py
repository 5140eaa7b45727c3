"""Find the images of a trained folder that are most similar to one or more query images.

    python examples/search.py runs/folder QUERY

This is the same as `pml-tacl search`. RUN is a folder that train_folder.py wrote. QUERY is an
image, a folder of images, or - to read the bytes of an image, or paths (one per line), from
standard input. The script prints a table and writes a gallery. --update first updates the index:
it embeds new and changed images, and removes deleted ones.
"""

import sys

from pml_tacl.cli.main import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
