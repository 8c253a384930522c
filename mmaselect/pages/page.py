"""Templates to pages: names from data sets are text, whatever they hold, and nothing is ever requested."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / 'templates'


def render(name: str, **values: Any) -> str:
    """Renders ``templates/NAME.html`` with the style of all pages and the script ``templates/NAME.js``.

    The page allows its one script by its digest, images that it holds, and nothing else.

    Args:
        name: Of the page.
        **values: What its template shows; all text is escaped.

    Returns:
        HTML.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style, script = ((TEMPLATES / file).read_text(encoding='utf-8') for file in ('style.css', f'{name}.js'))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template(f'{name}.html')
    return template.render(style=Markup(style), script=Markup(script), digest=digest, **values)
