"""Texts: the formats of packages, and what a failed download says.

The packages are tiny ones made here, behind an `apt-get` of our own. One test goes to the network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import stat
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest

from lola_vllm.training.texts import (
    MANIFEST,
    TextsError,
    cut_document,
    is_held_out,
    read_documents,
)
from tests.unit.training.test_texts import prose
from tools.texts import TextSource, fetch_texts, make_documents
from tools.texts.formats import (
    decode,
    read_code,
    read_html,
    read_plain,
    read_pod,
    read_r_strings,
    read_sword,
)
from tools.texts.package_index import PinnedFile

# --- formats


def write_sword(root: Path, testament: str, books: list[str]) -> Path:
    index, data = b"", b""
    for book in books:
        block = zlib.compress(book.encode())
        index += struct.pack("<III", len(data), len(block), len(book.encode()))
        data += block
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{testament}.bzs").write_bytes(index)
    (root / f"{testament}.bzz").write_bytes(data)
    return root / f"{testament}.bzs"


def test_sword_books_without_markup_titles_and_notes(tmp_path: Path) -> None:
    genesis = (
        '<title level="1">Genesis</title> <div sID="g1" type="x-p"/><chapter osisID="Gen.1"/>'
        '<w lemma="strong:H1">In</w> the beginning<note type="n">Or <i>first</i></note>, God'
        '<note>x</note><note n="2">y</note><w>made</w> all<note>z</note><q>things</q> '
        '<div eID="g1" type="x-p"/><lg sID="a"/> <l level="1" sID="b"/>“Light &amp; dark,'
        '<l eID="b" level="1"/> <l level="2" sID="c"/>dayé<l eID="c" level="2"/> <lg eID="a"/>end.'
    )
    write_sword(tmp_path / "m", "nt", ['<div sID="x" type="x-p"/>Good News'])
    write_sword(tmp_path / "m", "ot", ["<milestone/>", genesis])
    assert read_sword(tmp_path) == [
        "In the beginning, God made all things\n\n“Light & dark,\ndayé\n\nend.",
        "Good News",
    ]


def xdr_strings(lines: list[str | None], version: int = 3, kind: int = 16) -> bytes:
    block = b"X\n" + struct.pack(">iii", version, 0x40200, 0x30500)
    if version == 3:
        block += struct.pack(">i", 5) + b"UTF-8"
    block += struct.pack(">ii", kind, len(lines))
    for line in lines:
        data = b"" if line is None else line.encode()
        block += struct.pack(">ii", 0x40009, -1 if line is None else len(data)) + data
    return block


def write_rdb(path: Path, blocks: list[bytes]) -> Path:
    path.write_bytes(b"".join(struct.pack(">I", len(b)) + zlib.compress(b) for b in blocks))
    return path


def test_r_strings_of_both_format_versions(tmp_path: Path) -> None:
    emma = xdr_strings(["EMMA", "", "Emma Woodhouse, hand-", "some, née rich", None, "", "FINIS"])
    other = xdr_strings([], kind=13)  # a vector of integers
    persuasion = xdr_strings(["Persuasion"], version=2)
    rdb = write_rdb(tmp_path / "Rdata.rdb", [emma, other, persuasion])
    expected = "EMMA\n\nEmma Woodhouse, hand- some, née rich\n\nFINIS"
    assert read_r_strings(rdb) == [expected, "Persuasion"]


def test_html_prose_without_navigation_and_code(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head><title>T</title><script>x = '<p>no</p>'</script></head><body>"
        '<div class="related"><p>up<br>next <img src=x> </p></div><nav><p>menu</p></nav>'
        '<h1>Classes<a class="headerlink" href="#">¶</a></h1>'
        "<p>Use <code>x &lt; y</code>\n  now.<pre>code()</pre>loose text<blockquote><p>Quoted"
        "<p>unclosed <br/>one</blockquote></p></body></html>"
    )
    empty = tmp_path / "empty.html"
    empty.write_text("<body><pre>code</pre></body>")
    assert read_html([page, empty]) == [
        "Classes\n\nUse x < y now.\n\nQuoted\n\nunclosed one",
    ]


def test_pod_text_and_codes(tmp_path: Path) -> None:
    pod = tmp_path / "perlx.pod"
    pod.write_text(
        "=encoding utf8\n\n=head1 NAME\n\nperlx - B<bold I<both>> X<index>text,\non two lines\n\n"
        " $code = 1;\n\n=over 4\n\n=item *\n\nC<< $a <=> $b >> and C<E<lt>> E<233> E<0x41> "
        'E<amp>\n\n=item B<die>\n\nsee L<the docs|perlfunc/die>, L<perlop/"Quote">, L<perlre>, '
        'L</"Here">, L<https://example.org/a>, FOO<bar>\n\n=back\n\n=begin html\n\n<b>no</b>\n\n'
        "=end html\n\n=for comment no\n\nlast\n\n=cut\n"
    )
    assert read_pod([pod]) == [
        "\n\n".join(
            [
                "NAME",
                "perlx - bold both text, on two lines",
                "$a <=> $b and < é A &",
                "die",
                'see the docs, "Quote" in perlop, perlre, "Here", https://example.org/a, FObar',
                "last",
            ]
        )
    ]


def test_plain_text_keeps_verse_and_knows_two_encodings(tmp_path: Path) -> None:
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_bytes("Café\r\n  thee \r\n \r\n\r\nEnd\r\n".encode("cp1252"))
    new.write_bytes("Café".encode("utf-8-sig"))
    assert read_plain([old, new]) == ["Café\nthee\n\nEnd", "Café"]
    assert decode(b"\x81") == "\ufffd"


# --- documents and the split


def test_code_keeps_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("\n\ndef f(x):  \r\n    y = 1\n\n    return x\n\n\ng = 2\n")
    (document,) = read_code([tmp_path / "a.py"])
    assert document == "def f(x):\n    y = 1\n\n    return x\n\n\ng = 2"
    # Pieces of a file are cut where empty lines are, of which one stays.
    assert make_documents([document + "\n# a word" * 30]) == [
        "def f(x):\n    y = 1\n\n    return x\n\ng = 2" + "\n# a word" * 30
    ]


def test_make_documents_drops_repeats_and_scraps() -> None:
    old, other = prose(400, 1), prose(400, 2)
    revised = "\n\n".join([*old.split("\n\n")[:9], prose(120, 3)])
    assert make_documents([old, "too short", other, old, revised, "a\0b " * 60]) == [
        old,
        other,
        prose(120, 3),
        ("ab " * 60).strip(),
    ]
    # Short paragraphs repeat by right.
    play = "\n\n".join(f"HAMLET.\n\nspeech {number}" for number in range(40))
    assert make_documents([play]) == [play]


# --- fetching, with an apt-get of our own


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that `apt-get download` serves packages from, and logs the calls in."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    directory = tmp_path / "archive"
    programs = tmp_path / "bin"
    directory.mkdir()
    programs.mkdir()
    apt_get = programs / "apt-get"
    apt_get.write_text(
        f'#!/bin/sh\necho "$2" >> {directory}/log\necho "$@" > {directory}/options\n'
        f"[ -f {directory}/offline ] && "
        '{ echo "W: noise" >&2; echo "E: Failed to fetch it" >&2; exit 100; }\n'
        f'[ -f {directory}/$2.deb ] || {{ echo "E: Unable to locate package $2" >&2; exit 100; }}\n'
        f"cp {directory}/$2.deb ./$2_1.2_all.deb\n"
    )
    apt_get.chmod(apt_get.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return directory


def add_package(archive: Path, name: str, files: dict[str, str]) -> None:
    root = archive / name
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1.2\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    (root / "DEBIAN" / "control").write_text(control)
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    command = ["dpkg-deb", "--root-owner-group", "-b", str(root), str(archive / f"{name}.deb")]
    subprocess.run(command, check=True, capture_output=True)


def plain_source(name: str, *packages: str) -> TextSource:
    return TextSource(
        name, packages, "public domain", lambda root: read_plain(sorted(root.rglob("*.txt")))
    )


def log_of(archive: Path) -> list[str]:
    return (archive / "log").read_text().split()


def test_fetch_writes_texts_and_manifest_once(archive: Path, tmp_path: Path) -> None:
    add_package(archive, "old-doc", {"usr/a.txt": prose(6000, 0), "usr/b.txt": prose(100, 1)})
    add_package(archive, "poems", {"usr/c.txt": prose(200, 2)})
    sources = [plain_source("docs", "new-doc", "old-doc"), plain_source("poems", "poems")]
    lines: list[str] = []
    out = tmp_path / "texts"
    records = fetch_texts(out, sources=sources, report=lines.append)

    assert log_of(archive) == ["new-doc", "old-doc", "poems"]
    assert "AllowUnauthenticated=false" in (archive / "options").read_text()
    documents = [*cut_document(prose(6000, 0)), prose(100, 1)]
    assert len(documents) == 3
    assert read_documents(out / "docs.txt") == documents
    data = (out / "docs.txt").read_bytes()
    assert json.loads((out / MANIFEST).read_text())[0] == {
        "name": "docs",
        "package": "old-doc",
        "version": "1.2",
        "licence": "public domain",
        "bytes": len(data),
        "documents": 3,
        "held_out": sum(map(is_held_out, documents)),
        "sha256": hashlib.sha256(data).hexdigest(),
        "format": 1,
        "package_sha256": hashlib.sha256((archive / "old-doc.deb").read_bytes()).hexdigest(),
    }
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, "docs.txt", "poems.txt"]
    assert [line.rpartition(") ")[2] for line in lines] == ["written", "written"]

    # Nothing to do; then only what is damaged.
    assert fetch_texts(out, sources=sources, report=lines.append) == records
    assert len(log_of(archive)) == 3
    assert lines[-1].endswith("already there")
    (out / "poems.txt").write_text("half")
    assert fetch_texts(out, sources=sources) == records
    assert log_of(archive)[3:] == ["poems"]
    # Made by a reader of another time: made again.
    stale = [dataclasses.replace(record, format=0) for record in records]
    (out / MANIFEST).write_text(json.dumps([dataclasses.asdict(record) for record in stale]))
    assert fetch_texts(out, ["docs"], sources) == records[:1]
    assert [entry["format"] for entry in json.loads((out / MANIFEST).read_text())] == [1, 0]


def test_fetch_without_network_or_with_a_damaged_package(archive: Path, tmp_path: Path) -> None:
    sources = [plain_source("poems", "poems")]
    (archive / "offline").touch()
    with pytest.raises(TextsError, match=r"poems \(E: Failed to fetch it\); check the network"):
        fetch_texts(tmp_path / "texts", sources=sources)
    (archive / "offline").unlink()
    (archive / "poems.deb").write_text("half a package")
    with pytest.raises(TextsError, match=r"dpkg-deb could not unpack poems_1\.2_all\.deb \("):
        fetch_texts(tmp_path / "texts", sources=sources)
    assert list((tmp_path / "texts").iterdir()) == []


SETUP = "import pathlib\npathlib.Path({!r}).touch()\n"


def write_sdist(path: Path, setup: str) -> PinnedFile:
    """A source distribution with two texts, one of which points outside of it."""
    with tarfile.open(path, "w:gz") as tar:
        files = {"a/b_gut.txt": prose(100, 0), "../../c_gut.txt": prose(90, 1), "a/setup.py": setup}
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PinnedFile("poems", "0.6", "poems-0.6.tar.gz", digest)


def test_a_source_distribution_is_read_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, marker = tmp_path / "served", tmp_path / "it ran"
    served.mkdir()
    pinned = write_sdist(served / "poems-0.6.tar.gz", SETUP.format(str(marker)))
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    poems = TextSource(
        "poems", pinned, "public domain", lambda root: read_plain(sorted(root.rglob("*.txt")))
    )
    out = tmp_path / "out"
    (record,) = fetch_texts(out, sources=[poems])
    assert (record.package, record.version) == ("poems", "0.6")
    assert record.package_sha256 == pinned.sha256
    assert read_documents(out / "poems.txt") == [prose(100, 0), prose(90, 1)]
    assert not (tmp_path / "c_gut.txt").exists() and not marker.exists()

    # Another pin: what is there was made of something else, and the file is not the one wanted.
    other = dataclasses.replace(poems, origin=dataclasses.replace(pinned, sha256="0" * 64))
    with pytest.raises(TextsError, match=f"poems: .* has sha256 {pinned.sha256}, expected 0000"):
        fetch_texts(out, sources=[other])
    assert read_documents(out / "poems.txt") == [prose(100, 0), prose(90, 1)]
