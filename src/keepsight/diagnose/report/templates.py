"""Pages from Jinja templates that stand beside the code that fills them: one base, everything escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render(package: str, template: str, **fields: Any) -> str:
    """Fill a page.

    Args:
        package: where the template stands; it may extend `base.html` and use the parts of `parts.html` from here.
        template: its file.
        fields: what it names. Text is escaped; `markupsafe.Markup` is not.
    """
    own = [PackageLoader(name, ".") for name in dict.fromkeys((package, __package__))]
    environment = Environment(
        loader=ChoiceLoader(own), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share, digits=0: f"{share:.{digits}%}"
    environment.filters["thousands"] = lambda number: f"{number:,.0f}"
    return environment.get_template(template).render(fields) + "\n"
