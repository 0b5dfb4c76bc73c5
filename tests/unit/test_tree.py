"""A dataset's root wherever its parts lie: a folder, an archive, a folder of archives."""

import zipfile
from pathlib import Path

import pytest

from segbatch.datasets.tree import Tree
from segbatch.errors import ObjectMissing


def written(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{root.name}/{path}\n")
    return root


def packed(archive: Path, *paths: str) -> Path:
    with zipfile.ZipFile(archive, "w") as out:
        for path in paths:
            out.writestr(path, f"{archive.name}/{path}\n")
    return archive


def paths(tree: Tree, *arguments: str) -> list[str]:
    return [path for path, _ in tree.files(*arguments)]


def test_a_folder_is_read_as_it_lies(tmp_path: Path) -> None:
    tree = Tree.of(str(written(tmp_path, "a/1.png", "a/b/2.png", "list.txt", ".hidden/3.png")))
    assert paths(tree) == ["a/1.png", "a/b/2.png", "list.txt"] and paths(tree, "a") == ["1.png", "b/2.png"]
    assert [p for p, _ in tree.files("a", recursive=False)] == ["1.png"] and paths(tree, "nowhere") == []
    assert tree.folders() == ["a"] and tree.folders("a") == ["b"] and tree.folders("nowhere") == []
    assert tree.exists("list.txt") and tree.is_folder("a/b") and tree.is_folder("") and not tree.is_folder("list.txt")
    assert tree.read_lines("list.txt") == [f"{tmp_path.name}/list.txt"] and tree.stat("a/3.png") is None
    assert tree.uri("a/1.png") == f"{tmp_path}/a/1.png"
    with pytest.raises(ObjectMissing):
        tree.read_bytes("a/3.png")


def test_an_archive_is_read_like_a_folder(tmp_path: Path) -> None:
    archive = packed(tmp_path / "download.zip", "data/a/1.png", "data/list.txt")
    first, second = Tree.of(str(archive)).candidates()
    assert first.folders() == ["data"] and second.folders() == ["a"] and first.source == second.source == str(archive)
    assert paths(second) == ["a/1.png", "list.txt"] and second.read_bytes("list.txt") == b"download.zip/data/list.txt\n"
    assert second.uri("a/1.png").startswith(str(archive)) and second.stat("a/1.png") is not None


def test_candidates_stop_where_there_is_a_choice(tmp_path: Path) -> None:
    assert len(list(Tree.of(str(written(tmp_path / "x", "a/b/c/1.png", "a/b/d/1.png"))).candidates())) == 3
    assert len(list(Tree.of(str(written(tmp_path / "y", "a/1.png", "readme.txt"))).candidates())) == 1
    assert len(list(Tree.of(str(tmp_path / "absent")).candidates())) == 1


def test_a_folder_of_archives_reads_like_the_unpacked_one(tmp_path: Path) -> None:
    packed(tmp_path / "images.zip", "set/images/1.jpg", "set/images/2.jpg", "license.txt")
    packed(tmp_path / "labels.zip", "set/labels/1.png", "license.txt")
    written(tmp_path, "notes.txt")
    tree = Tree.of(str(tmp_path))
    assert tree.folders() == ["set"] and tree.folders("set") == ["images", "labels"]
    assert sorted(paths(tree)) == [
        "license.txt", "notes.txt", "set/images/1.jpg", "set/images/2.jpg", "set/labels/1.png",
    ]  # fmt: skip
    assert tree.read_bytes("set/labels/1.png") == b"labels.zip/set/labels/1.png\n"
    assert tree.read_bytes("license.txt") == b"images.zip/license.txt\n"  # the first archive that has it
    assert tree.is_folder("set/labels") and tree.exists("notes.txt") and not tree.exists("set/masks")
    assert tree.uri("set/masks/1.png") == f"{tmp_path}/set/masks/1.png"
