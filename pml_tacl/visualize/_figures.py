"""Style and fonts of all figures, and writing them to files."""

import os
from collections.abc import Callable
from functools import lru_cache, wraps
from io import BytesIO
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.files import atomic_write
from pml_tacl.visualize._inputs import shortened

_FONT = "DejaVu Sans"  # comes with matplotlib
_WIDER_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR",
    "Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "IPAexGothic",
    "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei",
    "Malgun Gothic", "Noto Sans", "Noto Sans Devanagari", "Noto Sans Thai", "FreeSans",
    "Arial Unicode MS",
)  # fmt: skip
_UNKNOWN = "□"

_STYLE = {
    "font.family": _FONT,
    "font.size": 8.0,
    "text.usetex": False,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "figure.facecolor": "white",
    "figure.dpi": 100.0,
}
# Leave out metadata that differs between runs.
_METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}

_P = ParamSpec("_P")


class NotebookFigure(Figure):
    """Figure that a notebook can show without pyplot."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png", metadata=_METADATA["png"])
        return content.getvalue()


def styled(function: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Decorate a function to draw in our style, without changing the user's style."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return wrapper


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: float = 100.0) -> Path:
    """Write a figure atomically; the same figure gives the same bytes.

    Args:
        figure: any matplotlib figure.
        path: the file; its ending (.png, .svg or .pdf) selects the format. Missing folders are
            created.
        dpi: dots per inch, above 0.

    Returns:
        The path.

    Raises:
        ValueError: if the ending is another one, or dpi is not above 0.
        OSError: if the file cannot be written; an existing file is then unchanged.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _METADATA:
        raise InputError(f"path must end in .png, .svg or .pdf, got {path.name!r}")
    if not dpi > 0:
        raise InputError(f"dpi must be above 0, got {dpi}")
    content = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pml_tacl"}):
        figure.savefig(content, format=kind, dpi=dpi, metadata=_METADATA[kind])
    with atomic_write(path) as file:
        file.write(content.getvalue())
    return path


def fitted(content: str, width: int) -> dict[str, Any]:
    """Return matplotlib keywords for a text: shortened to ``width``, in fonts that contain it."""
    content = shortened(str(content), width)
    beyond = any(ord(sign) not in _signs(_FONT) for sign in content)
    families = (_FONT, *_wider_fonts()) if beyond else (_FONT,)
    known = frozenset[int]().union(*map(_signs, families))
    content = "".join(sign if ord(sign) in known else _UNKNOWN for sign in content)
    return {"text": content, "family": list(families)}


@lru_cache(maxsize=1)
def _wider_fonts() -> tuple[str, ...]:
    installed = set(font_manager.get_font_names())
    return tuple(family for family in _WIDER_FONTS if family in installed)


@lru_cache
def _signs(family: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(family)).get_charmap())
