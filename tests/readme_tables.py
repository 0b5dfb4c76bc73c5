"""Tables of the README that follow from the registries. ``python tests/readme_tables.py`` writes them."""

import re
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"


def datasets() -> str:
    """Dataset x task x splits x formats x protocol."""
    from segbatch.datasets import registry
    from segbatch.metrics import registry as metrics

    lines = ["| dataset | tasks | official splits | `segbatch export` | protocol |", "|---|---|---|---|---|"]
    for name in sorted(registry.BUILT_IN):
        found = registry.dataset(name)
        formats = ", ".join(f"`{f}`" for f in found.formats)
        protocol = f"`{metrics.default_protocol(name, found.tasks)}`" if found.tasks else ""
        cells = [f"`{name}`", ", ".join(found.tasks), ", ".join(found.official_splits), formats, protocol]
        lines.append("| " + " | ".join(c or "–" for c in cells) + " |")
    return "\n".join(lines)


def formats() -> str:
    """Format x task x what it is x whether it can be imported."""
    from segbatch.formats import registry

    lines = ["| format | task | import | what it is |", "|---|---|---|---|"]
    for name in sorted(registry.BUILT_IN):
        found = registry.format_of(name)
        summary = (
            " ".join((found.__doc__ or "").split("\n\n")[0].split()).rstrip(".").replace("``", "`").replace("|", "\\|")
        )
        lines.append(f"| `{name}` | {found.task} | {'yes' if found.can_import else 'no'} | {summary} |")
    return "\n".join(lines)


def metrics() -> str:
    """Protocol x what it scores x the evaluator whose figures it gives."""
    from segbatch.metrics import registry

    columns = {"semantic": "label maps", "instances": "objects", "panoptic": "segments"}
    lines = ["| protocol | of | the figures of |", "|---|---|---|"]
    for name in sorted(registry.BUILT_IN):
        found: Any = registry.metric(name)
        source = found.source.replace("|", "\\|")
        lines.append(f"| `{name}` | {columns.get(found.task_column, found.task_column)} | {source} |")
    return "\n".join(lines)


def models() -> str:
    """Network in the form of its paper x task x parameters x speed."""
    from segbatch.models import catalogue
    from segbatch.models.architectures import ARCHITECTURES

    lines = ["| model | form | task | parameters | images/s |", "|---|---|---|---|---|"]
    for card in catalogue.cards():
        task = ARCHITECTURES[card.architecture].task
        speed = f"{card.images_per_s:g} at {card.width}x{card.height}"
        name = f"`{card.architecture}@FOLDER`"
        lines.append(f"| {name} | {card.form} | {task} | {card.parameters:,} | {speed} |")
    return "\n".join(lines)


TABLES = {"models": models, "datasets": datasets, "formats": formats, "metrics": metrics}


def up_to_date(text: str) -> str:
    """The README with its tables made anew."""
    for name, make in TABLES.items():
        table = make()
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
        text = pattern.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text)
    return text


if __name__ == "__main__":
    sys.path.insert(0, str(README.parent))
    README.write_text(up_to_date(README.read_text()))
