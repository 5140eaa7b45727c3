"""What mkdocs needs beyond its plugins: formulas without a script from another host."""

import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?(?:pml_tacl\.(?:\w+\.)*)?")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fences that GitHub draws as formulas become MathML, which browsers draw themselves."""

    def formula(match: re.Match[str]) -> str:
        return convert(" ".join(match[1].split()), display="block")

    return _FORMULA.sub(formula, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other objects as Sphinx does; here the name alone is shown."""
    return _ROLE.sub("<code>", html)
