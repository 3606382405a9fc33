"""Files and folders as documents."""

import pytest

from lola_vllm.command.client import ClientError
from lola_vllm.command.client.documents import (
    MAX_CHARS,
    documents_of,
    files_of,
    read_file,
    without_running_lines,
)

PAGE = """<html><head><title>Pumps</title><style>p {}</style></head><body><nav>Home</nav>
<h1>Hall 2</h1><p>The pump <b>starts</b> at<br>14:03.</p><ul><li>one</li><li>two</li></ul>
<script>x = 1</script></body></html>"""


def test_a_folder_is_its_texts_by_path(tmp_path):
    for name in ("b.md", "a/c.txt", "a/.hidden/d.txt", "a/picture.png", "a/e.HTML"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [title for _, title in files_of([tmp_path])] == ["a/c.txt", "a/e.HTML", "b.md"]
    assert files_of([tmp_path / "a/picture.png"])[0][1] == "picture.png"
    with pytest.raises(ClientError, match=r"called 'b\.md'"):
        files_of([tmp_path, tmp_path / "b.md"])
    with pytest.raises(ClientError, match="no such file"):
        files_of([tmp_path / "z"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClientError, match="no file in it"):
        files_of([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("\ufeffStraße".encode(), "Straße"),
        ("Straße".encode("utf-16"), "Straße"),
        ("Straße".encode("latin-1"), "Straße"),
    ],
)
def test_texts_in_several_encodings(tmp_path, data, text):
    (tmp_path / "t.txt").write_bytes(data)
    assert read_file(tmp_path / "t.txt") == text


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "t.bin").write_bytes(b"\x7fELF\0\0")
    with pytest.raises(ClientError, match="it is no text"):
        read_file(tmp_path / "t.bin")
    (tmp_path / "t.txt").write_text(" \n")
    with pytest.raises(ClientError, match="it has no text"):
        read_file(tmp_path / "t.txt")


def test_html(tmp_path):
    pytest.importorskip("bs4")
    (tmp_path / "p.html").write_text(PAGE)
    assert read_file(tmp_path / "p.html") == (
        "Pumps\n\nHall 2\n\nThe pump starts at\n14:03.\n\none\n\ntwo"
    )


# A page as DocBook, mandoc, Sphinx and MkDocs put bars around it.
BARS = """<html><head><title>ls(1) - manual</title></head><body><header>Site</header>
<div class="navheader"><table><tr><th>Prev</th></tr></table></div>
<div class="sphinxsidebar"><ul><li>Contents</li></ul></div>
<table class="head"><tr><td>LS(1)</td><td>User Commands</td></tr></table>
<h2>NAME<a class="headerlink" href="#name">\xb6</a></h2><p>ls - list a directory</p>
<table><tr><th>code</th><th>meaning</th></tr><tr><td>2</td><td>trouble</td></tr></table>
<div role="navigation">Next</div><footer>Imprint</footer></body></html>"""


def test_html_begins_with_its_text(tmp_path):
    pytest.importorskip("bs4")
    (tmp_path / "p.html").write_text(BARS)
    text = read_file(tmp_path / "p.html")
    assert " ".join(text.split()) == (
        "ls(1) - manual NAME ls - list a directory code meaning 2 trouble"
    )
    (tmp_path / "q.html").write_text(
        "<title>Pumps</title><body><ul><li>Home</li></ul><main><h1>Pumps</h1>Hall 2</main>Imprint"
    )
    assert read_file(tmp_path / "q.html").split() == ["Pumps", "Hall", "2"]


@pytest.mark.parametrize(
    ("header", "footer"),
    [
        (
            "_\bL_\bS(1)      User Commands      _\bL_\bS(1)",
            "GNU coreutils 9.7   June 2025   LS(1)",
        ),
        ("ls(1)   General Commands Manual   ls(1)", "Debian    June 3, 2025    Debian"),
        ("LS(1)GeneralCommandsManual LS(1)", "9.7   June 2025   LS(1)"),
    ],
)
def test_a_manual_page_begins_with_its_text(tmp_path, header, footer):
    body = (
        "N\bNA\bAM\bME\bE\n  \x1b[1mls\x1b[0m  -  list  direc\u2010\n  tories, as dir(1) and LS(1)"
    )
    (tmp_path / "ls.txt").write_text(f"{header}\n\n{body}\n\n{footer}\n")
    text = read_file(tmp_path / "ls.txt")
    assert " ".join(text.split()) == "NAME ls - list directories, as dir(1) and LS(1)"
    assert "ls - list dir" in text
    other = "A table:  a   b\n1   LS(1)"  # no manual page
    (tmp_path / "t.txt").write_text(other)
    assert read_file(tmp_path / "t.txt") == other


def test_headers_and_footers_of_pages_are_no_text():
    pages = [f"Manual  {i}\nText {word}\nPage {i} of 4" for i, word in enumerate("abcd", 1)]
    assert without_running_lines(pages) == "Text a\n\nText b\n\nText c\n\nText d"
    assert without_running_lines(["a\nb", "a\nc"]) == "a\nb\n\na\nc"  # too few to tell
    assert without_running_lines(["", "a"]).strip() == "a"


def test_pdf(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "p.pdf")
    with pytest.raises(ClientError, match="a scan has pictures"):
        read_file(tmp_path / "p.pdf")
    (tmp_path / "q.pdf").write_bytes(b"no pdf")
    with pytest.raises(ClientError, match="cannot be read"):
        read_file(tmp_path / "q.pdf")


def test_a_very_long_text_is_several_documents():
    assert documents_of("t", "short") == [("t", "short")]
    text = "x" * 1000 + "\n\n"
    whole = text * (2 * MAX_CHARS // len(text))
    found = documents_of("t", whole)
    assert [one.title for one in found] == ["t (1 of 2)", "t (2 of 2)"]
    assert "".join(one.text for one in found) == whole
    assert all(len(one.text) <= MAX_CHARS for one in found)
    assert all(one.text.startswith("\n\n") for one in found[1:])
    assert "".join(one.text for one in documents_of("t", "y" * 2_000_000)) == "y" * 2_000_000
