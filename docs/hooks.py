"""Hooks of mkdocs: formulas as MathML, the pages of the parts, and the map of the code."""

import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))
from code_map import PAGE, ROOT, with_map

_FORMULA = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?(?:pml_tacl\.(?:\w+\.)*)?")


def on_config(config: Any) -> Any:
    """Put each page of docs/components into the navigation, where mkdocs.yml names the folder."""
    folder = Path(config["docs_dir"]) / "components"
    pages = sorted(f"components/{path.name}" for path in folder.glob("*.md"))
    for section in config["nav"]:
        for name, value in section.items():
            if value == "components/":
                section[name] = pages
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Convert formulas to MathML, which browsers draw without a script; update the code map."""
    if Path(page.file.abs_src_path) == PAGE:
        markdown = with_map(markdown, ROOT / "pml_tacl")

    def formula(match: re.Match[str]) -> str:
        return convert(" ".join(match[1].split()), display="block")

    return _FORMULA.sub(formula, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show the names of objects in docstrings without their Sphinx roles."""
    return _ROLE.sub("<code>", html)
