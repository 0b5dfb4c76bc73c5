"""The README's tables are those of the registries."""

from readme_tables import README, up_to_date

from segbatch.datasets import registry as datasets
from segbatch.formats import registry as formats


def test_the_tables_are_not_stale() -> None:
    text = README.read_text()
    assert text == up_to_date(text), "run: python tests/readme_tables.py"


def test_every_format_that_a_dataset_names_exists() -> None:
    for name in datasets.BUILT_IN:
        assert set(datasets.dataset(name).formats) <= set(formats.BUILT_IN), name
