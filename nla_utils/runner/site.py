"""``nla report``: section 11 and the executed notebooks as one static HTML site that needs no network."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

from nla_utils.artefacts import atomic_write
from nla_utils.config import ROOT
from nla_utils.errors import ArtefactError


def build_site(out: Path, root: Path = ROOT) -> list[Path]:
    """Render the pages of ``paper`` and every executed notebook below ``root`` into ``out``.

    Returns the pages, ``index.html`` first. Raises ``ArtefactError`` if there is no section yet.
    """
    section = root / "paper" / "section11.md"
    if not section.exists():
        raise ArtefactError(f"{section} does not exist; run `nla paper` first")
    beside = {"appendix": "Appendix", "tail_reader": "The tail reader", "depth": "Depth", "comparison": "Ways of reading",
              "PROTOCOL": "The measurement"}
    notebooks = sorted((root / "notebooks" / "executed").glob("*/*/*.ipynb"))
    names = {n: f"{n.parts[-3]}-{n.parts[-2]}-{n.stem}.html" for n in notebooks}
    pages = {"index.html": ("§11, reproduced and audited", _markdown(section))}
    pages |= {f"{stem}.html": (title, _markdown(section.with_name(f"{stem}.md"))) for stem, title in beside.items()
              if section.with_name(f"{stem}.md").exists()}  # fmt: skip
    pages |= {names[n]: (_label(n), _notebook(n)) for n in notebooks}
    links = {name: title for name, (title, _) in pages.items()} | {"index.html": "Section 11"}
    for name, (title, body) in pages.items():
        atomic_write(out / name, _page(title, body, links, name).encode())
    return [out / name for name in pages]


def _label(notebook: Path) -> str:
    return f"{notebook.parts[-3]} · {notebook.parts[-2]} · {notebook.stem[:2]}"


def _page(title: str, body: str, links: dict[str, str], own: str) -> str:
    style = Path(__file__).with_name("site.css").read_text(encoding="utf-8")
    nav = "".join(
        f'<a href="{name}"{" aria-current=page" if name == own else ""}>{html.escape(label)}</a>'
        for name, label in links.items()
    )
    body = re.sub(r"(<table.*?</table>)", r'<div class="table">\1</div>', body, flags=re.S)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body><nav>{nav}</nav><main>{body}</main></body></html>\n"
    )


def _markdown(path: Path) -> str:
    """Markdown as HTML with its pictures inside."""

    def inline(match: re.Match) -> str:
        picture = (path.parent / match[1]).resolve()
        return f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"'

    return re.sub(r'src="([^":]+\.png)"', inline, markdown2html(path.read_text(encoding="utf-8")))


def _notebook(path: Path) -> str:
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    body, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
    # Scripts and styles of single cells are not needed to read them, and would need a network.
    return re.sub(r"<(script|style)\b.*?</\1>", "", body, flags=re.S)
