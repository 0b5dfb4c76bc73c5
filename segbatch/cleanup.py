"""Clean up: what run roots hold that nobody needs, and the oldest of many runs.

Of a run root go, while no driver is at work on it:

- temporary files of writers that are gone (local; a bucket's life-cycle rule ends unfinished multipart uploads);
- plan folders that no published plan names, with what is in them;
- outcome logs none of whose lines tells of a result that is there now;
- quarantine of samples whose file or shard has changed since;
- heartbeats of drivers that died, and probes for put-if-absent.

Of a folder of run roots go, beside these, the oldest complete runs beyond a number, counted by verb. What a run that
stays was made from stays too. Of a run that goes, its tables' part files and ``.segbatch`` go; other files that lie in
it stay, and so does the folder then.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from segbatch import drivers, schemas, storage, tables
from segbatch.drivers import Driver
from segbatch.errors import ConfigError, ObjectMissing
from segbatch.runs import Run
from segbatch.storage import ObjectInfo
from segbatch.tables import service

_PROBE = "probe-"


@dataclass(frozen=True, slots=True)
class Garbage:
    """Files that nobody needs.

    Attributes:
        root: the run root that they lie in.
        kind: ``temporary``, ``plan``, ``outcomes``, ``quarantine``, ``driver``, ``probe`` or ``run``.
        what: for people.
        files: all of them, in the order in which they are to go.
    """

    root: str
    kind: str
    what: str
    files: tuple[ObjectInfo, ...]

    @property
    def bytes(self) -> int:
        """Their size together."""
        return sum(f.size for f in self.files)


@dataclass(frozen=True, slots=True)
class Cleanup:
    """What is to go or has gone.

    Attributes:
        garbage: the files, by run root and kind.
        busy: run roots that were left alone, with the drivers that are at work on them.
        kept: run roots of ``--keep-runs`` that stay although they are old, with the reason.
    """

    garbage: tuple[Garbage, ...] = ()
    busy: dict[str, tuple[Driver, ...]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def find(
    roots: Sequence[str], open_run: Callable[[str], Run], keep_runs: int | None = None, incomplete: bool = False
) -> Cleanup:
    """What may go; removes nothing.

    Args:
        roots: run roots, or with ``keep_runs`` folders of run roots.
        open_run: opens the run at a run root.
        keep_runs: so many complete runs of each verb stay, the newest; None keeps all.
        incomplete: runs that were never finished may go, too, by the time they were begun.

    Raises:
        ConfigError: no run root there, or a driver is at work on the only one.
    """
    resolved = [storage.resolve(r) for r in roots]
    if keep_runs is None:
        for root in resolved:
            if not _is_run_root(root):
                raise ConfigError(f"{root} is not a run root: it has no .segbatch/config.json", "give OUT of a run")
        found = resolved
    else:
        found = [r for root in resolved for r in _run_roots(root)]
        if not found:
            raise ConfigError(f"there are no run roots below {', '.join(resolved)}", "give the folder that holds them")
    looked = drivers.look(found)
    busy = {r: tuple(d for d in there if d.alive) for r, there in looked.items() if any(d.alive for d in there)}
    if list(busy) == resolved:
        raise ConfigError(f"{found[0]} is in use by {busy[found[0]][0].name}", "clean up when it is done")
    old, kept = ({}, {}) if keep_runs is None else _old_runs(found, set(busy), keep_runs, incomplete)
    garbage: list[Garbage] = []
    for root in (r for r in found if r not in busy):
        garbage += [_whole(root, old[root])] if root in old else _of_root(open_run(root), looked[root])
    return Cleanup(tuple(g for g in garbage if g.files), busy, kept)


def remove(garbage: Iterable[Garbage]) -> None:
    """Delete the files, and the folders that are empty then."""
    for entry in garbage:
        for info in entry.files:
            storage.delete(info.uri)
        folders = {folder for info in entry.files for folder in _folders_above(info.uri, entry.root)}
        for folder in sorted(folders, key=len, reverse=True):
            storage.remove_empty_folder(folder)


def _folders_above(uri: str, root: str) -> Iterator[str]:
    """The folders that a file lies in, up to the run root itself."""
    while len(uri := uri.rsplit("/", 1)[0]) >= len(root):
        yield uri


# -- of one run root -------------------------------------------------------------------------------------------------


def _of_root(run: Run, found: Sequence[Driver]) -> list[Garbage]:
    def of(kind: str, what: str, files: Iterable[ObjectInfo]) -> Garbage:
        listed = tuple(files)
        return Garbage(run.root, kind, f"{len(listed)} {what}", listed)

    dead = {f"{d.driver}.json" for d in found}
    heartbeats = storage.list_files(service(run.root, "drivers"), (".json",))
    probes = storage.list_files(service(run.root), recursive=False)
    return [
        of("temporary", "temporary files of writers that are gone", storage.left_temporary(run.root)),
        of("plan", "files of plans that were never published", _unpublished(run)),
        of("outcomes", "outcome logs that tell nothing any more", run.void_logs()),
        of("quarantine", "quarantined samples that have changed since", run.stale_quarantine()),
        of("driver", "heartbeats of drivers that died", (h for h in heartbeats if storage.name_of(h.uri) in dead)),
        of("probe", "probes of the store", (p for p in probes if storage.name_of(p.uri).startswith(_PROBE))),
    ]


def _unpublished(run: Run) -> Iterator[ObjectInfo]:
    folder = service(run.root, "plans")
    named = {info.folder for info in run.plans()}
    for name in storage.list_folders(folder):
        if name not in named:
            yield from storage.list_files(storage.join(folder, name))


# -- whole runs ------------------------------------------------------------------------------------------------------


def _is_run_root(root: str) -> bool:
    return storage.exists(service(root, "config.json"))


def _run_roots(folder: str) -> Iterator[str]:
    """Every run root in a folder, not those within another one."""
    if _is_run_root(folder):
        yield folder
        return
    for name in storage.list_folders(folder):
        yield from _run_roots(storage.join(folder, name))


@dataclass(frozen=True, slots=True)
class _Known:
    """What the service files of a run root tell: by whom and when it was made, and what it was made from."""

    root: str
    verb: str
    when: str
    is_complete: bool
    sources: tuple[str, ...]


def _known(root: str) -> _Known:
    document = _json(service(root, "config.json"))
    manifest = _json(service(root, "manifest.json"))
    names = {storage.name_of(f.uri) for f in storage.list_files(service(root), recursive=False)}
    published = storage.list_files(service(root, "plans"), (".json",), recursive=False)
    plans = sum(1 for _ in published)
    is_complete = bool(manifest) and all(f"SUCCESS-{n}" in names for n in range(plans))
    texts = [v for v in document.get("config", {}).values() if isinstance(v, str)]
    when = str(manifest["finished"] if is_complete else document.get("created", ""))
    return _Known(root, str(document.get("verb", "")), when, is_complete, tuple(texts))


def _json(uri: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except ObjectMissing:
        return {}
    return found


def _old_runs(
    roots: Sequence[str], busy: set[str], keep: int, incomplete: bool
) -> tuple[dict[str, _Known], dict[str, str]]:
    """Runs beyond the newest ``keep`` of each verb, and those of them that stay with the reason."""
    by_verb: dict[str, list[_Known]] = defaultdict(list)
    known = {root: _known(root) for root in roots}
    for run in known.values():
        if run.root not in busy and (run.is_complete or incomplete):
            by_verb[run.verb].append(run)
    old = {r.root: r for runs in by_verb.values() for r in sorted(runs, key=lambda r: r.when, reverse=True)[keep:]}
    kept: dict[str, str] = {}
    while needed := {
        old_root: root
        for old_root in old
        for root, run in known.items()
        if root not in old and any(_leads_to(s, old_root) for s in run.sources)
    }:
        for root, by in needed.items():
            kept[root] = f"{by} was made from it"
            del old[root]
    return old, kept


def _leads_to(source: str, root: str) -> bool:
    """Whether what a run was made from is this run root or lies in it."""
    return source == root or source.startswith(f"{root}/")


def _whole(root: str, run: _Known) -> Garbage:
    """All that segbatch wrote there; what says that it is a complete run goes last."""
    found = [p for table in schemas.TABLES for p in tables.list_parts(storage.join(root, table))]
    found += storage.left_temporary(root)
    service_files = list(storage.list_files(service(root)))
    last = [f for f in service_files if "/" not in storage.relative(f.uri, service(root))]
    last.sort(key=lambda f: storage.name_of(f.uri) == "config.json")
    found += [f for f in service_files if f not in last]
    what = f"{'' if run.is_complete else 'incomplete '}run of segbatch {run.verb} of {run.when}"
    return Garbage(root, "run", what, (*found, *last))
