"""The docstring of a public name: its sections and its arguments."""

import inspect
import re

from .check import Check

SECTIONS = {
    # Of a model around another one, which has no paper.
    "model": (
        "Args",
        "Call arguments",
        "Input shape",
        "Output shape",
        "Raises",
        "Example",
    ),
    "layer": (
        "Args",
        "Call arguments",
        "Input shape",
        "Output shape",
        "Raises",
        "Reference",
        "Example",
    ),
    "optimizer": ("Args", "Raises", "Reference", "Example"),
    "metric": ("Args", "Raises", "Reference", "Example"),
    "loss": ("Args", "Call arguments", "Raises", "Reference", "Example"),
    "class": (),
    "function": (),
}
# Sections of items, `name: text`, whose further lines are indented more.
OF_ITEMS = {"Args", "Attributes", "Call arguments", "Raises"}
ITEM = re.compile(r" {4}[*`\w.]+(, [*`\w.]+)*:( |$)")


def check_docstring(thing, kind):
    """Requires a summary, the kind's sections, every argument and a doctest."""
    with Check("docstring") as check:
        doc = own_docstring(thing)
        check.that(doc, f"expected {thing.__name__} to have a docstring", repr(doc))
        summary = doc.splitlines()[0]
        check.that(
            summary.endswith((".", ":")), "expected a summary line first", repr(summary)
        )
        for section in SECTIONS[kind]:
            check.that(
                has_section(doc, section),
                f"expected {thing.__name__}'s docstring to have a section `{section}:`",
                f"sections {sections(doc)}",
            )
        arguments = own_arguments(thing)
        if arguments:
            check.that(
                has_section(doc, "Args") or has_section(doc, "Attribute"),
                f"expected {thing.__name__}'s docstring to have a section `Args:`",
                f"sections {sections(doc)}",
            )
        for name in arguments:
            check.that(
                re.search(rf"^\s+`?{name}`?\b[^:\n]*:", doc, re.MULTILINE),
                f"expected {thing.__name__}'s docstring to describe the argument "
                f"{name!r}",
                "no line that starts with it",
            )
        wrapped = badly_wrapped(doc)
        check.that(
            not wrapped,
            f"expected the lines that go on with an item of {thing.__name__}'s "
            "docstring to be indented more than the item",
            f"{wrapped}",
        )
        if "Example" in SECTIONS[kind]:
            check.that(
                ">>>" in doc,
                f"expected {thing.__name__}'s example to be a doctest (>>>)",
                "none",
            )


def own_docstring(thing):
    """The cleaned docstring a class or function states itself, not its base's."""
    doc = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return inspect.cleandoc(doc) if doc else None


def own_arguments(thing):
    """The named arguments a class's own `__init__`, or a function, takes."""
    if inspect.isclass(thing):
        if "__init__" not in thing.__dict__:
            return []
        thing = thing.__dict__["__init__"]
    return [
        p.name
        for p in inspect.signature(thing).parameters.values()
        if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def sections(doc):
    """The headings of a docstring: lines at its margin that end in a colon."""
    return re.findall(r"^([A-Z][A-Za-z ]*):", doc, re.MULTILINE)


def badly_wrapped(doc):
    """Lines that go on with an argument or an error and stand as one themselves."""
    found, section = [], None
    for line in doc.splitlines():
        if line[:1].strip():
            section = (sections(line) or [None])[0]
        elif section in OF_ITEMS and re.match(r" {1,7}\S", line):
            if not ITEM.match(line):
                found.append(line.strip())
    return found


def has_section(doc, section):
    """Whether a docstring has a heading, singular or plural."""
    return any(re.fullmatch(rf"{section}s?", found) for found in sections(doc))
