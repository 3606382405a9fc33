"""MkDocs' hook: adds the pages that are made of the code and the files beside docs/, and leads
links that leave docs/ to their pages in the site."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.site import cli_page, http_page

ROOT = Path(__file__).parents[2]
REFERENCE = {
    "reference/cli.md": cli_page.page,
    "reference/http.md": http_page.page,
}
# Files of the repository that are pages of the site too.
FILES = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "lola_vllm/models/smollm2/CARD.md": "project/demo-model.md",
    "lola_vllm/models/qwen2_5_coder/CARD.md": "project/second-model.md",
}
# Of those that are a part of a model's card.
TITLES = {"project/demo-model.md": "The demo model", "project/second-model.md": "The second model"}
_SITE = {**FILES, **{page: page for page in REFERENCE}}
_REPOSITORY = {page: name for name, page in FILES.items()}
# In Markdown, and in HTML's pictures.
_LINK = re.compile(r"""(\]\(|\bsrc(?:set)?=")([^)"#\s]+)(#[^)"\s]*)?(?=[)"])""")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ does not have."""
    for page, make in REFERENCE.items():
        files.append(File.generated(config, page, content=make()))
    for name, page in FILES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        if page in TITLES:
            text = f"# {TITLES[page]}\n\n{text}"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they must be in the site."""
    here = page.file.src_uri
    source = _REPOSITORY.get(here, f"docs/{here}")

    def to_site(link: re.Match[str]) -> str:
        target = link[2]
        if re.match(r"[a-z]+:", target) or here in REFERENCE:
            return link[0]
        path = normpath(f"{Path(source).parent.as_posix()}/{target}")
        site = path.removeprefix("docs/") if path.startswith("docs/") else _SITE.get(path)
        if site is None:
            raise ValueError(f"{source} links to {target}, which is no page of the site")
        return f"{link[1]}{relpath(site, Path(here).parent.as_posix())}{link[3] or ''}"

    return _LINK.sub(to_site, markdown)
