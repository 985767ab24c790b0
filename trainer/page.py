"""Templates to pages: text is escaped wherever it comes from, and a page fetches nothing."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.rows import counted, plain, shown, signed
from trainer.storage import write_atomically, write_synced
from trainer.trials import value_text


def write_page(target: Path, template: str, **given: object) -> None:
    """Fill a template and write the page, whole or not at all."""
    text = environment().get_template(template).render(given)
    write_atomically(target, lambda path: write_synced(path, text.encode("utf-8", "replace")))


def environment() -> Environment:
    """Of this package's templates."""
    made = Environment(
        loader=PackageLoader("trainer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "signed": signed,
        "plain": plain,
        "shown": shown,
        "counted": counted,
        "value_text": value_text,
        "python": repr,
    }
    return made
