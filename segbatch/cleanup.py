"""Clean up: what run roots hold that nobody needs, and the oldest of many runs.

Of a run root go, while no driver is at work on it:

- temporary files of writers that are gone (local; a bucket's life-cycle rule ends unfinished multipart uploads);
- plan folders that no published plan names, with what is in them;
- outcome logs none of whose lines tells of a result that is there now;
- quarantine of samples whose file or shard has changed since;
- heartbeats of drivers that died, and probes for put-if-absent.

Of a folder of run roots go, beside these, the oldest complete runs beyond a number, counted by verb. What a run that
stays was made from stays too, also if that run lies within another one or is a trained model. Of a run that goes, its
tables' part files and ``.segbatch`` go; other files that lie in it stay, and so does the folder then. Symbolic links
are not followed.
"""

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from segbatch import drivers, schemas, storage, tables
from segbatch.drivers import Driver
from segbatch.errors import ConfigError, ObjectMissing
from segbatch.runs import Run
from segbatch.storage import ObjectInfo
from segbatch.tables import service

_PROBE = "probe-"

_PATIENCE_S = 150.0
"""A heartbeat elsewhere that does not change for so long is a dead driver's: longer than a store may take for one."""


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
        found = list({_place(r): r for root in resolved for r in _run_roots(root)}.values())
        if not found:
            raise ConfigError(f"there are no run roots below {', '.join(resolved)}", "give the folder that holds them")
    # Before drivers are looked for: what one begins later is not among them
    plans = {root: storage.list_folders(service(root, "plans")) for root in found}
    looked = drivers.look(found, _PATIENCE_S)
    busy = {r: tuple(d for d in there if d.alive) for r, there in looked.items() if any(d.alive for d in there)}
    if list(busy) == resolved:
        raise ConfigError(f"{found[0]} is in use by {busy[found[0]][0].name}", "clean up when it is done")
    old, kept = ({}, {}) if keep_runs is None else _old_runs(found, resolved, set(busy), keep_runs, incomplete)
    garbage: list[Garbage] = []
    for root in (r for r in found if r not in busy):
        garbage += [_whole(root, old[root])] if root in old else _of_root(open_run(root), looked[root], plans[root])
    return Cleanup(tuple(g for g in garbage if g.files), busy, kept)


def remove(found: Cleanup) -> Cleanup:
    """Delete the files, and the folders that are empty then.

    Returns:
        What has gone: a run root that a driver has begun to work on since is left alone.
    """
    gone: list[Garbage] = []
    busy = dict(found.busy)
    for root, entries in itertools.groupby(found.garbage, lambda g: g.root):
        here = list(entries)
        if there := _begun_since(root, here):
            busy[root] = there
            continue
        for entry in here:
            _delete(entry)
            gone.append(entry)
    return replace(found, garbage=tuple(gone), busy=busy)


def _begun_since(root: str, garbage: Sequence[Garbage]) -> tuple[Driver, ...]:
    """Drivers whose heartbeats are not among the garbage."""
    known = {info.uri for entry in garbage for info in entry.files}
    return tuple(driver for uri, (_, driver) in drivers.heartbeats(root).items() if uri not in known)


def _delete(entry: Garbage) -> None:
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


def _of_root(run: Run, found: Sequence[Driver], plans: Sequence[str]) -> list[Garbage]:
    def of(kind: str, what: str, files: Iterable[ObjectInfo]) -> Garbage:
        listed = tuple(files)
        return Garbage(run.root, kind, f"{len(listed)} {what}", listed)

    dead = {f"{d.driver}.json" for d in found}
    heartbeats = storage.list_files(service(run.root, "drivers"), (".json",))
    probes = storage.list_files(service(run.root), recursive=False)
    return [
        of("temporary", "temporary files of writers that are gone", storage.left_temporary(run.root)),
        of("plan", "files of plans that were never published", _unpublished(run, plans)),
        of("outcomes", "outcome logs that tell nothing any more", run.void_logs()),
        of("quarantine", "quarantined samples that have changed since", run.stale_quarantine()),
        of("driver", "heartbeats of drivers that died", (h for h in heartbeats if storage.name_of(h.uri) in dead)),
        of("probe", "probes of the store", (p for p in probes if storage.name_of(p.uri).startswith(_PROBE))),
    ]


def _unpublished(run: Run, folders: Sequence[str]) -> Iterator[ObjectInfo]:
    named = {info.folder for info in run.plans()}
    for name in folders:
        if name not in named:
            yield from storage.list_files(service(run.root, "plans", name))


# -- whole runs ------------------------------------------------------------------------------------------------------


def _is_run_root(root: str) -> bool:
    return storage.exists(service(root, "config.json"))


def _run_roots(folder: str) -> Iterator[str]:
    """Every run root in a folder, not those within another one."""
    if _is_run_root(folder):
        if "verb" in _json(service(folder, "config.json")):  # else a trained model
            yield folder
        return
    for inner in _folders(folder):
        yield from _run_roots(inner)


def _all_roots(folder: str) -> Iterator[str]:
    """Every run root and trained model in a folder, also those within others."""
    if _is_run_root(folder):
        yield folder
    for inner in _folders(folder):
        if storage.name_of(inner) not in (*schemas.TABLES, tables.SERVICE) or _is_run_root(inner):
            yield from _all_roots(inner)


def _folders(folder: str) -> Iterator[str]:
    """The folders in a folder, but no links."""
    for name in storage.list_folders(folder):
        inner = storage.join(folder, name)
        if not (storage.is_local(inner) and os.path.islink(inner)):
            yield inner


def _place(uri: str) -> str:
    """Where it really is, past all links."""
    return os.path.realpath(uri) if storage.is_local(uri) else uri


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
    when = str(manifest["finished"] if is_complete else document.get("created", ""))
    return _Known(root, str(document.get("verb", "")), when, is_complete, tuple(map(_place, _texts(document))))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a document that may be a place."""
    if isinstance(value, str) and "/" in value:
        yield value
    elif isinstance(value, Mapping | list):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(member)


def _json(uri: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except ObjectMissing:
        return {}
    return found


def _old_runs(
    roots: Sequence[str], folders: Sequence[str], busy: set[str], keep: int, incomplete: bool
) -> tuple[dict[str, _Known], dict[str, str]]:
    """Runs beyond the newest ``keep`` of each verb, and those of them that stay with the reason."""
    by_verb: dict[str, list[_Known]] = defaultdict(list)
    known = {root: _known(root) for root in roots}
    inner = (root for folder in folders for root in _all_roots(folder))
    everything = known | {root: _known(root) for root in inner if root not in known}
    for run in known.values():
        if run.root not in busy and (run.is_complete or incomplete):
            by_verb[run.verb].append(run)
    old = {r.root: r for runs in by_verb.values() for r in sorted(runs, key=lambda r: r.when, reverse=True)[keep:]}
    kept: dict[str, str] = {}
    while needed := {
        old_root: root
        for old_root in old
        for root, run in everything.items()
        if root not in old and any(_leads_to(s, _place(old_root)) for s in run.sources)
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
