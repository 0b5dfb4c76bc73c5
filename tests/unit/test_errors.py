"""Errors travel from Ray actors to the driver, so every one must survive pickling."""

import importlib
import pickle
import pkgutil

import pytest

import segbatch
from segbatch.errors import DataError, SegbatchError


def all_errors() -> list[type[SegbatchError]]:
    for module in pkgutil.walk_packages(segbatch.__path__, "segbatch."):
        importlib.import_module(module.name)
    found, todo = [], [SegbatchError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo += kind.__subclasses__()
    return sorted(set(found), key=lambda k: (k.__module__, k.__qualname__))


@pytest.mark.parametrize("kind", all_errors(), ids=lambda k: k.__name__)
def test_pickles_with_all_attributes(kind: type[SegbatchError]) -> None:
    more = ("truncated", "s3://bucket/a.jpg") if issubclass(kind, DataError) else ()
    error = kind("the file /a.jpg is cut short", "copy it again", *more)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert copy.args == error.args
    assert str(copy) == str(error) == "the file /a.jpg is cut short (copy it again)"
    assert (copy.exit_code, copy.retryable) == (kind.exit_code, kind.retryable)


@pytest.mark.parametrize("kind", all_errors(), ids=lambda k: k.__name__)
def test_exit_codes(kind: type[SegbatchError]) -> None:
    assert kind.exit_code in (1, 2, 3, 4)
    assert str(kind("no fix")) == "no fix"
