"""Files and folders as documents: a title and a text each. PDF and HTML by the extra `library`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lola_vllm.command.client import ClientError

# Of a document that is sent at once; a server takes 4 MiB, in which a character may have 4 bytes.
MAX_CHARS = 900_000
_EXTRA = "install it with pip install 'lola-vllm[library]'"
_HTML = (".html", ".htm", ".xhtml")
_PDF = (".pdf",)
# What a folder's files may be called; a file that is named is read whatever it is called.
_TEXT = (
    ".txt", ".md", ".rst", ".adoc", ".org", ".tex", ".log", ".csv", ".json", ".toml", ".yaml",
    ".yml", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".sh", "",
)  # fmt: skip
# What of a page is its text, where it says so; and what is not: bars, headers and footers, by
# HTML5, ARIA, and the classes of DocBook, mandoc, Sphinx and MkDocs.
_MAIN = "main, [role=main]"
_LEFT_OUT = (
    "script, style, noscript, template, svg, head, nav, footer, aside, body > header, "
    "[role=navigation], [role=banner], [role=contentinfo], [role=search], "
    "div.header, div.footer, div#header, div#footer, div.navheader, div.navfooter, div.navbar, "
    "div.sidebar, div.toc, div.menu, .breadcrumb, .breadcrumbs, table.head, table.foot, "
    "div.related, div.sphinxsidebar, a.headerlink"
)
# Elements that begin a paragraph.
_BLOCKS = (
    "p", "div", "section", "article", "li", "dt", "dd", "pre", "blockquote", "tr", "table", "h1",
    "h2", "h3", "h4", "h5", "h6", "hr", "figure",
)  # fmt: skip


# How terminals show bold and underlined letters: a letter struck over another, or a sequence.
_STRUCK = re.compile(r"[^\n]\x08|\x1b\[[0-9;]*m")
_MAN_HEADER = re.compile(r"\s*(\S+?\(\w+\)).*\s\1[ \t]*\n")
# Of a justified text: a word that was cut at a line's end, and spaces that make lines equally long.
_HYPHEN, _SPACES = re.compile(r"\u2010\n[ \t]*"), re.compile(r"(?<=\S) {2,3}(?=\S)")
_NUMBER = re.compile(r"\d+")


class FileText(NamedTuple):
    """A document: its title in a library, and its text."""

    title: str
    text: str


def files_of(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """The files that are meant, with their titles: a file's name, or its path in a folder.

    Raises:
        ClientError: a path that is not there, a folder without readable files, or two files of one
            title.
    """
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(_inside(path))
            if not inside:
                raise ClientError(f"{path}: no file in it is text, HTML or PDF; name the files")
            found += [(file, file.relative_to(path).as_posix()) for file in inside]
        elif path.is_file():
            found.append((path, path.name))
        else:
            raise ClientError(f"{path}: there is no such file or folder")
    titles = [title for _, title in found]
    for title in titles:
        if titles.count(title) > 1:
            raise ClientError(f"two files are called {title!r}; add them from the folder above")
    return found


def documents_of(title: str, text: str) -> list[FileText]:
    """A text as one document, or as several where it is too long for one, cut behind paragraphs."""
    texts = []
    while len(text) > MAX_CHARS:
        end = max(text.rfind("\n\n", MAX_CHARS // 2, MAX_CHARS), MAX_CHARS // 2)
        texts.append(text[:end])
        text = text[end:]
    texts.append(text)
    if len(texts) == 1:
        return [FileText(title, text)]
    return [FileText(f"{title} ({i} of {len(texts)})", part) for i, part in enumerate(texts, 1)]


def read_file(path: Path) -> str:
    """The text of a file.

    Raises:
        ClientError: it has none, or the extra is not installed that reads it.
    """
    suffix = path.suffix.lower()
    text = _pdf(path) if suffix in _PDF else _decoded(path)
    text = _html(path, text) if suffix in _HTML else man_text(_STRUCK.sub("", text))
    if not text.strip():
        scanned = "; a scan has pictures of text, which are not read" if suffix in _PDF else ""
        raise ClientError(f"{path}: it has no text{scanned}")
    return text


def man_text(text: str) -> str:
    """A manual page as `man` prints it, without its headers and footers and with whole words; any
    other text as it is."""
    header = _MAN_HEADER.match(text)
    if header is None:
        return text
    title = header[1]
    running = re.compile(rf"(.*\s{{3,}})?{re.escape(title)}\s*")
    lines = [line for line in text[header.end() :].splitlines() if not running.fullmatch(line)]
    while lines and not lines[-1].strip():
        lines.pop()
    # The footer of BSD's pages begins and ends with the name of the system.
    fields = re.split(r"\s{3,}", lines[-1].strip()) if lines else []
    if len(fields) > 1 and fields[0] == fields[-1]:
        lines.pop()
    return _SPACES.sub(" ", _HYPHEN.sub("", "\n".join(lines))).strip("\n")


def _inside(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.suffix.lower() in (*_TEXT, *_HTML, *_PDF):
            yield path


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data[:8192] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ClientError(f"{path}: it is no text; PDF and HTML are known by .pdf and .html")
    for encoding in ("utf-8-sig", "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def _pdf(path: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise ClientError(f"{path}: PDF needs the package pypdf; {_EXTRA}") from None
    try:
        return without_running_lines([page.extract_text() for page in PdfReader(path).pages])
    except PyPdfError as error:
        raise ClientError(f"{path}: the PDF cannot be read ({error})") from None


def without_running_lines(pages: Sequence[str]) -> str:
    """Pages one behind the other, without the first and last lines that many share but for their
    numbers: three pages or more, and a third of all."""
    lines = [page.strip().splitlines() for page in pages]
    for end in (0, -1):
        found = [_NUMBER.sub("", page[end]).strip() if page else None for page in lines]
        times, least = Counter(found), max(3, len(pages) / 3)
        for page, line in zip(lines, found, strict=True):
            if page and times[line] >= least:
                del page[end]
    return "\n\n".join("\n".join(page) for page in lines)


def _html(path: Path, page: str) -> str:
    try:
        from bs4 import BeautifulSoup
    except ImportError:
        raise ClientError(f"{path}: HTML needs the package beautifulsoup4; {_EXTRA}") from None
    soup = BeautifulSoup(page, "html.parser")
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    for element in soup.select(_LEFT_OUT):
        element.decompose()
    main = soup.select_one(_MAIN) or soup
    for line in main.find_all("br"):
        line.replace_with("\n")
    for cell in main.find_all(("td", "th")):
        cell.insert_after(" ")
    for block in main.find_all(_BLOCKS):
        block.insert_before("\n\n")
        block.insert_after("\n\n")
    kept = [line.strip() for line in main.get_text().splitlines()]
    paragraphs = "\n".join(kept)
    while "\n\n\n" in paragraphs:
        paragraphs = paragraphs.replace("\n\n\n", "\n\n")
    paragraphs = paragraphs.strip()
    return paragraphs if paragraphs.startswith(title) else f"{title}\n\n{paragraphs}"
