"""What a checkpoint's folder says of its licence and its revision on the hub, and what it cannot smuggle in by that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from transom.models.provenance import METADATA, licence, printable, revision

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def card(folder: Path, front_matter: str) -> Path:
    (folder / "README.md").write_text(front_matter)
    return folder


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: apache-2.0\n---\n# Card\n", {"id": "apache-2.0"}),
        ("---\r\nlicense: 'mit'\r\n---\r\n", {"id": "mit"}),
        ("\ufeff---\nlicense: mit # as before\n---\n", {"id": "mit"}),
        ("---\ntags:\n- a\nlicense:\n- mit\n- apache-2.0\nlanguage: en\n---\n", {"id": "mit, apache-2.0"}),
        ('---\nlicense: [mit, "bsd"]\n---\n', {"id": "mit, bsd"}),
        (
            "---\nlicense: other\nlicense_name: open-weights 1\nlicense_link: https://example.org/LICENSE#terms\n---\n",
            {"id": "other", "name": "open-weights 1", "link": "https://example.org/LICENSE#terms"},
        ),
        ("---\nlicense:\n---\n", {}),
        ("---\n  license: mit\n---\n", {}),  # of another key
        ("---\nlicense: mit\n", {}),  # a line, no front matter
        ("license: mit\n---\n", {}),
        ("", {}),
    ],
)
def test_the_card_says_the_licence(tmp_path: Path, text: str, found: dict[str, str]) -> None:
    assert licence(card(tmp_path, text)) == found


def test_a_licence_file_is_named(tmp_path: Path) -> None:
    for name in ("LICENSE-2.txt", "licensed.py", "COPYING"):
        (tmp_path / name).write_text("terms")
    (tmp_path / "LICENSE").mkdir()
    assert licence(tmp_path) == {"file": "COPYING"}
    assert licence(card(tmp_path, "---\nlicense: gpl-3.0\n---\n")) == {"id": "gpl-3.0", "file": "COPYING"}


def test_hostile_text_is_cut_and_printable(tmp_path: Path) -> None:
    text = "---\nlicense: m\x1b[31mit\u202e\x00 x" + "y" * 1000 + "\n---\n"
    found = licence(card(tmp_path, text))["id"]
    assert found.startswith("m [31mit x")
    assert len(found) == 100
    assert found.isprintable()
    assert printable("a\t\n b\x7f", 3) == "a b"
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n" + b"x: y\n" * 200_000 + b"---\n")
    assert licence(tmp_path) == {}  # no end of the front matter within what is read


def test_the_revision_is_that_of_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert revision(folder, {}, ()) == revision(link, {}, ()) == revision(folder / "0_Transformer", {}, ()) == COMMIT
    assert revision(tmp_path / "snapshots" / "main", {}, ()) is None


def test_the_revision_is_what_the_hubs_client_notes(tmp_path: Path) -> None:
    files = (tmp_path / "config.json", tmp_path / "model.safetensors")
    (tmp_path / METADATA).mkdir(parents=True)

    def note(file: Path, commit: str) -> None:
        file.write_text("{}")
        os.utime(file, (1000, 1000))
        (tmp_path / METADATA / f"{file.name}.metadata").write_text(f"{commit}\netag\n1000.5\n")

    for file in files:
        note(file, COMMIT)
    assert revision(tmp_path, {"_commit_hash": OTHER}, files) == COMMIT
    os.utime(files[1], (2000, 2000))  # changed since
    assert revision(tmp_path, {"_commit_hash": OTHER}, files) is None
    note(files[1], OTHER)  # of two commits
    assert revision(tmp_path, {}, files) is None
    note(files[1], "\x1b]0;title")
    assert revision(tmp_path, {}, files[1:]) is None


@pytest.mark.parametrize(("said", "found"), [(COMMIT, COMMIT), ("main", None), (7, None), (COMMIT.upper(), None)])
def test_a_config_may_say_the_revision(tmp_path: Path, said: object, found: str | None) -> None:
    assert revision(tmp_path, {"_commit_hash": said}, ()) == found
    assert revision(tmp_path, {}, ()) is None
