"""`python -m pml_tacl`: the same as `pml-tacl`."""

from pml_tacl.cli.main import main

if __name__ == "__main__":
    main()
