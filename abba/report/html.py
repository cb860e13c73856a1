"""HTML and SVG as nested calls. Whatever is not made here is text and is escaped, so no page can carry a script."""

from html import escape


class Html(str):
    """Markup that `tag` has made."""


def tag(name: str, *content: object, **attributes: object) -> Html:
    """<name attributes>content</name>; `class_` is written class, and stroke_width stroke-width."""
    written = "".join(f' {_attribute(key)}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{join(content)}</{name}>")


def join(content) -> Html:
    """Parts one after the other; a part that is no Html is text."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in content))


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-") if key != "viewBox" else key
