"""Sphinx extension: what every page of the site carries, and what it does not."""

from __future__ import annotations

import re

PARAMETERS = re.compile(r"<dl>\n((?:<dd><em class=\"sig-param\">.*</dd>\n)+)</dl>")


def lines(definitions: str) -> str:
    """The parameters of a signature, one a line."""
    return definitions.replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")


def on_page(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Leave out the scripts of Thebe, which the book does not use and which declare the same constant twice.

    And the text of the badge from the description of a chapter.
    """
    # Sphinx lists the parameters of a long signature as definitions without terms, which readers of screens trip over.
    context["body"] = PARAMETERS.sub(lambda match: lines(match[1]), context.get("body", ""))
    context["metatags"] = context.get("metatags", "").replace('content="Open in Colab ', 'content="')
    context.setdefault("default_mode", "auto")  # light or dark as the reader's system says

    def is_thebe(script) -> bool:
        return "thebe" in f"{script.filename} {script.attributes.get('body', '')}".lower()

    context["script_files"] = [script for script in context.get("script_files", []) if not is_thebe(script)]


def setup(app) -> dict:
    """Connect to Sphinx."""
    app.connect("html-page-context", on_page, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
