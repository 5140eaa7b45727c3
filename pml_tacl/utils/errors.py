"""The errors that this package raises for what a user can mend."""


class PmlTaclError(Exception):
    """What a user can mend. The message is one line: what is wrong, and what to give instead.

    :func:`pml_tacl.cli.run_folder.one_line_errors` ends a script with that line. An error of any
    other type, but for the operating system's, is a fault of a program and keeps its traceback.
    """


class InputError(PmlTaclError, ValueError):
    """An argument or a file that does not fit."""


class InputTypeError(PmlTaclError, TypeError):
    """An argument of a wrong type."""


class MissingPackageError(PmlTaclError, ImportError):
    """A package that is needed for this is not installed."""


class DivergedError(PmlTaclError, FloatingPointError):
    """The loss is no longer finite."""
