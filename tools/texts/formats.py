"""Readers of the formats that `tools.texts` finds texts in; standard library alone.

Each reader takes the root of an unpacked package, or its files, and returns whole documents as
plain text: paragraphs separated by an empty line, with line breaks only in verse and in code. A
package that does not have the expected form gives a `TextFormatError` or no documents. It never
gives a part of them.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

_XDR_VECTOR_OF_STRINGS = 16
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_BLOCKS = _HEADINGS | {
    *("p", "div", "pre", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "td", "th"),
    *("blockquote", "section", "article", "nav", "body"),
}
_HIDDEN_TAGS = frozenset({"script", "style", "nav", "title"})
# Navigation and tables of contents of Sphinx, DocBook and Publican, and the marks after headings.
_HIDDEN_CLASSES = frozenset(
    {"related", "sphinxsidebar", "contents", "navheader", "navfooter", "toc", "docnav"}
    | {"headerlink", "id_link", "footer"}
)
_VOID_TAGS = frozenset({"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"})
# Two characters that occur in no text replace < and > until all POD codes are removed.
_POD_LT, _POD_GT = "\x01", "\x02"
_POD_ESCAPES = {"lt": _POD_LT, "gt": _POD_GT, "sol": "/", "verbar": "|"}


class TextFormatError(ValueError):
    """A file of a package is not in the format that its reader knows."""


def paragraphs(text: str, *, verse: bool) -> list[str]:
    """Split plain text at its empty lines.

    Args:
        text: any text; line ends of all systems.
        verse: keep line breaks inside a paragraph; otherwise lines are joined by one space.

    Returns:
        The paragraphs that are not blank, without white space around them.
    """
    found = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = [" ".join(line.split()) for line in block.split("\n")]
        paragraph = ("\n" if verse else " ").join(line for line in lines if line)
        if paragraph:
            found.append(paragraph)
    return found


def decode(data: bytes) -> str:
    """Text of a file that is UTF-8, with or without a mark, or else Windows' Latin 1."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def read_plain(files: Iterable[Path]) -> list[str]:
    """Each file as one document of verse, as editions of Project Gutenberg are laid out."""
    return ["\n\n".join(paragraphs(decode(file.read_bytes()), verse=True)) for file in files]


def read_code(files: Iterable[Path]) -> list[str]:
    """Each file as one document, its lines as they are but for white space at their ends."""
    lines = ([line.rstrip() for line in decode(file.read_bytes()).splitlines()] for file in files)
    return ["\n".join(of_file).strip("\n") for of_file in lines]


def read_sword(root: Path) -> list[str]:
    """The books of a SWORD module, a zText of OSIS markup compressed book by book.

    Args:
        root: a directory with `ot.bzs`, `ot.bzz` and the same of `nt` somewhere below it.

    Returns:
        One document a book, in order; headings and footnotes are left out.

    Raises:
        TextFormatError: an index that points outside of its data, or a block that zlib refuses.
    """
    books = []
    for testament in ("ot", "nt"):
        for index_file in sorted(root.rglob(f"{testament}.bzs")):
            index, data = index_file.read_bytes(), index_file.with_suffix(".bzz").read_bytes()
            try:
                for offset, size, length in struct.iter_unpack("<III", index):
                    block = zlib.decompress(data[offset : offset + size])
                    if len(block) != length:
                        raise TextFormatError(f"{index_file}: a block is not as long as it says")
                    books.append(_osis_text(block.decode("utf-8")))
            except (struct.error, zlib.error, UnicodeDecodeError) as error:
                raise TextFormatError(f"{index_file}: not a SWORD zText ({error})") from None
    return [book for book in books if book]


def _osis_text(markup: str) -> str:
    markup = re.sub(r"<title\b[^>]*(?<!/)>.*?</title>", "", markup, flags=re.DOTALL)
    markup = re.sub(r"<note\b[^>]*(?<!/)>.*?</note>", "\0", markup, flags=re.DOTALL)
    # A note may be the only separator of two words, or precede a comma.
    markup = re.sub(r"\0+(?=(?:<[^>]*>)*[\w\u201c\u2018(])", " ", markup).replace("\0", "")
    # A book is one line; its paragraphs, stanzas and verse lines are empty elements.
    markup = re.sub(r'<div [^>]*type="x-p"[^>]*/>|<(lg|chapter) [^>]*/>', "\n\n", markup)
    markup = re.sub(r"<l [^>]*eID=[^>]*/>", "\n", markup)
    return "\n\n".join(paragraphs(html.unescape(re.sub(r"<[^>]+>", "", markup)), verse=True))


def read_r_strings(rdb: Path) -> list[str]:
    """The vectors of strings in an R package's lazy-load database, one line of text a string.

    Args:
        rdb: a `.rdb` file: blocks of a big-endian length and a zlib stream of R's XDR format.

    Returns:
        One document a vector, its lines joined to paragraphs. Objects of other types are skipped.

    Raises:
        TextFormatError: a block that zlib refuses, or that ends early.
    """
    data, documents = rdb.read_bytes(), []
    while data:
        stream = zlib.decompressobj()
        try:
            block = stream.decompress(data[4:])
            lines = _xdr_strings(block)
        except (zlib.error, struct.error, UnicodeDecodeError) as error:
            raise TextFormatError(f"{rdb}: not an R lazy-load database ({error})") from None
        if not stream.eof:
            raise TextFormatError(f"{rdb}: the last block is cut off")
        data = stream.unused_data
        documents.append("\n\n".join(paragraphs("\n".join(lines), verse=False)))
    return [document for document in documents if document]


def _xdr_strings(block: bytes) -> list[str]:
    """The strings of a serialized character vector; none if it is any other object."""
    if block[:2] != b"X\n":
        return []
    (version,) = struct.unpack_from(">i", block, 2)
    at = 14  # after the marker, the format's version, and two versions of R
    if version >= 3:  # these name the native encoding
        at += 4 + struct.unpack_from(">i", block, at)[0]
    flags, count = struct.unpack_from(">ii", block, at)
    if flags & 0xFF != _XDR_VECTOR_OF_STRINGS:
        return []
    at, strings = at + 8, []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", block, at)
        at += 8
        if length > len(block) - at:
            raise struct.error("a string ends behind its block")
        if length >= 0:  # -1 is NA
            strings.append(block[at : at + length].decode("utf-8"))
            at += length
    return strings


class _Prose(HTMLParser):
    """Collects headings and paragraphs of a page, without navigation."""

    def __init__(self, paragraph_class: str | None) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._paragraph_class = paragraph_class
        self._parts: list[str] | None = None
        self._hidden = 0  # open elements inside of, and with, the hidden one

    def _is_paragraph(self, tag: str, classes: Iterable[str]) -> bool:
        if tag in _HEADINGS:
            return True
        return tag == "p" if self._paragraph_class is None else self._paragraph_class in classes

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        classes = (attributes.get("class") or "").split()
        if self._hidden:
            self._hidden += tag not in _VOID_TAGS
        elif tag in _HIDDEN_TAGS or not _HIDDEN_CLASSES.isdisjoint(classes):
            self._hidden = 1
        if tag in _BLOCKS:
            self._flush()
            if not self._hidden and self._is_paragraph(tag, classes):
                self._parts = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass  # an empty element has no text and hides nothing

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._hidden -= tag not in _VOID_TAGS
        if tag in _BLOCKS:
            self._flush()

    def handle_data(self, data: str) -> None:
        if self._parts is not None and not self._hidden:
            self._parts.append(data)

    def _flush(self) -> None:
        text = " ".join("".join(self._parts or ()).split())
        if text:
            self.paragraphs.append(text)
        self._parts = None


def read_html(files: Iterable[Path], paragraph_class: str | None = None) -> list[str]:
    """Headings and paragraphs of pages, one document a page.

    Args:
        files: pages in UTF-8, well-formed around their navigation.
        paragraph_class: class of the elements that hold paragraphs; default: `<p>` elements.

    Returns:
        The pages that have at least one paragraph or heading, without code, lists of links and
        navigation.
    """
    pages = []
    for file in files:
        parser = _Prose(paragraph_class)
        parser.feed(decode(file.read_bytes()))
        parser.close()
        pages.append("\n\n".join(parser.paragraphs))
    return [page for page in pages if page]


def read_pod(files: Iterable[Path]) -> list[str]:
    """Headings, list items and paragraphs of Perl's manual pages, one document a file."""
    return [page for page in ("\n\n".join(_pod_paragraphs(file)) for file in files) if page]


def _pod_paragraphs(file: Path) -> Iterator[str]:
    in_format = False  # between =begin and =end: text for one formatter only
    for block in re.split(r"\n\s*\n", decode(file.read_bytes())):
        block = block.strip("\n")
        command = re.match(r"=(\w+)\s*", block)
        if command:
            in_format = command[1] == "begin" or (in_format and command[1] != "end")
            if not re.fullmatch(r"head\d|item", command[1]):
                continue
            block = block[command.end() :]
            if re.fullmatch(r"[*\d.\s]*", block):  # a bullet or a number
                continue
        if in_format or block[:1] in (" ", "\t"):  # indented: code
            continue
        text = _pod_text(" ".join(block.split()))
        text = text.replace(_POD_LT, "<").replace(_POD_GT, ">").strip()
        if text:
            yield text


def _pod_text(text: str) -> str:
    """Replace formatting codes, C<< like >> I<these>, by the text that a reader sees."""
    for brackets in (4, 3, 2):  # their content may have single brackets that mean themselves
        pattern = rf"([A-Z])<{{{brackets}}}\s+(.*?)\s+>{{{brackets}}}"
        text = re.sub(pattern, lambda code: _pod_code(code[1], _pod_text(code[2])), text)
    while True:  # from the inside out
        text, count = re.subn(r"([A-Z])<([^<>]*)>", lambda code: _pod_code(code[1], code[2]), text)
        if not count:
            return text


def _pod_code(letter: str, content: str) -> str:
    content = content.replace("<", _POD_LT).replace(">", _POD_GT)
    if letter in "XZ":  # index entries, and nothing
        return ""
    if letter == "E":
        character = _POD_ESCAPES.get(content)
        if character is None:
            number = re.fullmatch(r"0?x([0-9a-fA-F]+)|(\d+)", content)
            entity = f"#{content}" if number and number[2] else f"#x{number[1]}" if number else ""
            character = html.unescape(f"&{entity or content};")
        return character
    if letter == "L":
        label, bar, _ = content.partition("|")
        if bar or re.match(r"\w+:[^:]", content):  # a label, or a bare address
            return label
        page, _, section = content.partition("/")
        section = section.strip('"')
        return f'"{section}" in {page}' if page and section else page or f'"{section}"'
    return content
