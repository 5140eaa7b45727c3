"""Errors of this package that a user can fix."""


class PmlTaclError(Exception):
    """Error that a user can fix. Its message is one line: the problem and what to give instead.

    :func:`pml_tacl.cli.run_folder.one_line_errors` prints that line and ends the script. Errors of
    other types are bugs and keep their traceback, except those of the operating system.
    """


class InputError(PmlTaclError, ValueError):
    """Error for an invalid argument or file."""


class InputTypeError(PmlTaclError, TypeError):
    """Error for an argument of a wrong type."""


class MissingPackageError(PmlTaclError, ImportError):
    """Error for a required package that is not installed."""


class DivergedError(PmlTaclError, FloatingPointError):
    """Error for a loss that is NaN or infinite."""
