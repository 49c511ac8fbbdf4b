"""What mkdocs needs to build the site: pages and pictures from outside of docs/, links to them, formulas as MathML.

The pages can also be read where they lie, in the tree: there their links go to files of the tree. mkdocs.yml names this
file as a hook. The site needs no script for formulas, because browsers draw MathML.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent

OUTSIDE = {
    "benchmarks.md": "bench/README.md",
    "gpu.md": "bench/results/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Page of the site -> the file that it is made of, from the root of the tree."""

PICTURES = "bench/results"
EXAMPLES = ROOT / "examples"
"""Each program here becomes a page: its docstring, its picture from docs/images/examples/, its code."""
SITE_OF = {**{path: page for page, path in OUTSIDE.items()}, "README.md": "index.md"}

_FENCE = re.compile(r"^(```|~~~).*?^\1 *$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
_PARAGRAPH = re.compile(r"<p>.*?</p>", re.DOTALL)
_ARGUMENT = re.compile(r"(?:(?<=<p>)|(?<=\.\s))([a-z_]\w*(?:,\s[a-z_]\w*)*):\s")
_LOADS = re.compile(
    r'<(?:script|img|iframe)[^>]* src="https?:[^"]*"|<link[^>]* rel="stylesheet"[^>]* href="https?:[^"]*"'
)
_TAG = re.compile(r"\\tag\{([^}]*)\}")
_KNOWN = {
    **{rf"\{size}{side}": rf"\{end}{side}" for size in ("big", "Big") for side, end in (("(", "left"), (")", "right"))},
    **{
        rf"{size}\{side}Vert": rf"\{end}\Vert "
        for size in (r"\Big", "")
        for side, end in (("l", "left"), ("r", "right"))
    },
    r"\mathrel{+}=": r"\mathrel{+=}",
    r"\mathbb E": "\N{MATHEMATICAL DOUBLE-STRUCK CAPITAL E}",
}
"""What latex2mathml does not know, or browsers draw badly -> what they draw well."""


def on_config(config: Any) -> Any:
    """Add the examples to the navigation, before the help."""
    if names := example_names():
        pages = [{"All": "examples/index.md"}, *(f"examples/{name}.md" for name in names)]
        config.nav.insert(2, {"Examples": pages})
    return config


def example_names() -> list[str]:
    """Return the names of the programs in examples/."""
    return sorted(path.stem for path in EXAMPLES.glob("*.py"))


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures from outside of docs/."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    names = example_names()
    for name in names:
        files.append(File.generated(config, f"examples/{name}.md", content=example_page(name)))
    if names:
        files.append(File.generated(config, "examples/index.md", content=gallery(names)))
    return files


def about(name: str) -> tuple[str, str, str]:
    """Return the first sentence of an example's docstring, the rest of it, and the code without it."""
    source = (EXAMPLES / f"{name}.py").read_text()
    tree = ast.parse(source)
    title, _, rest = (ast.get_docstring(tree) or name).partition("\n")
    code = "\n".join(source.splitlines()[tree.body[0].end_lineno :]) if ast.get_docstring(tree) else source
    return title.rstrip("."), rest.strip(), code.strip()


def picture(name: str) -> str:
    """Return the picture of an example in Markdown. The strict build fails if there is none."""
    return f"![What it draws](../images/examples/{name}.png)\n\n"


def example_page(name: str) -> str:
    """Return the page of an example."""
    title, rest, code = about(name)
    head = f"title: {name.replace('_', ' ')}\nhide: [toc]"  # the code is wide
    return f"---\n{head}\n---\n\n# {title}\n\n{rest}\n\n{picture(name)}```python\n{code}\n```\n"


def gallery(names: list[str]) -> str:
    """Return the page of all examples."""
    shown = (f"## [{about(name)[0]}]({name}.md)\n\n{picture(name)}`python examples/{name}.py`\n" for name in names)
    return "# Examples\n\nPrograms that run as they stand, each in under three minutes on two cores.\n\n" + "\n".join(
        shown
    )


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page, which go to files of the tree, into links to pages of the site."""
    if page.file.src_uri.startswith("examples/"):
        return markdown
    here = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(found: re.Match[str]) -> str:
        if "://" in found[2]:
            return found[0]
        target = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(here), found[2])), here)
        return found[1] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".") + found[3]

    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [_LINK.sub(link, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join((*pieces, _LINK.sub(link, markdown[end:])))


def site_path(path: str, page: str) -> str:
    """Return the place on the site of a file of the tree. Raises PluginError if the site does not have it."""
    if path in SITE_OF:
        return SITE_OF[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "examples" or posixpath.dirname(path) == "examples":
        return f"examples/{'index' if path == 'examples' else Path(path).stem}.md"
    if posixpath.dirname(path) == PICTURES and path.endswith(".png"):
        return f"pictures/{posixpath.basename(path)}"
    raise PluginError(f"{page} links to {path}, which is not on the site. Name it without a link, as `{path}`.")


def on_page_content(html_text: str, page: Any, **_: Any) -> str:
    """Draw the formulas of a page as MathML; in the reference begin a line for each argument that a docstring names."""
    if page.file.src_uri.startswith("api/"):
        html_text = _PARAGRAPH.sub(by_argument, html_text)
    return _FORMULA.sub(formula, html_text)


def by_argument(found: re.Match[str]) -> str:
    """Return a paragraph of a docstring, `name: what it is. other: ...`, with a line for each name."""
    return _ARGUMENT.sub(r'<span class="argument"></span><code>\1</code>: ', found[0])


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads anything from a server."""
    if loads := _LOADS.search(output):
        raise PluginError(f"{page.file.src_uri} loads {loads[0]} from a server. No page needs the network.")
    return output


def formula(found: re.Match[str]) -> str:
    r"""Return the MathML of one formula, which stands as \(...\) in a line or as \[...\] by itself."""
    latex = html.unescape(found[2]).strip()[2:-2].strip()
    if found[1] == "span":
        return convert(latex)
    for unknown, known in _KNOWN.items():
        latex = latex.replace(unknown, known)
    number = _TAG.search(latex)
    drawn = convert(_TAG.sub("", latex), display="block")
    return f'<div class="equation">{drawn}<span>{f"({number[1]})" if number else ""}</span></div>'
