"""Markdown as the web page shows it: which elements it becomes, how it grows, and what nothing may do to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason="the server needs the extra 'server'")
pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright: extra 'test'")

from playwright.sync_api import Page  # noqa: E402
from web_page import browser, find_browser, served  # noqa: E402

if find_browser() is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

MARKDOWN = {
    "paragraphs": ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    "emphasis": ("**b** *i* ***bi*** ~~d~~ __b__ _i_", "<p><strong>b</strong> <em>i</em> <em><strong>bi</strong></em> "
                 "<del>d</del> <strong>b</strong> <em>i</em></p>"),
    "chinese emphasis": ("请看**“重点：”**后面", "<p>请看<strong>“重点：”</strong>后面</p>"),
    "nested emphasis": ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    "crossing emphasis": ("*a _b* c_", "<p><em>a _b</em> c_</p>"),
    "no emphasis": ("2 * 3 * 4, a_b_c, **open, *****", "<p>2 * 3 * 4, a_b_c, **open, *****</p>"),
    "escapes": (r"\*a\* \# \z", r"<p>*a* # \z</p>"),
    "code": ("`a*b*` ``x ` y`` `open", "<p><code>a*b*</code> <code>x ` y</code> `open</p>"),
    "headings": ("# a\n### *b* ##\n#no", "<h3>a</h3><h5><em>b</em></h5><p>#no</p>"),
    "rule": ("a\n\n---\n* * *", "<p>a</p><hr><hr>"),
    "quote": ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    "list": ("- a\n- b\n  - c\n\nd", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>d</p>"),
    "numbers": ("如下：\n1. a\n2. b", "<p>如下：</p><ol><li>a</li><li>b</li></ol>"),
    "start": ("3. c\n4. d", '<ol start="3"><li>c</li><li>d</li></ol>'),
    "loose list": ("1. a\n\n   b\n\n2. c", "<ol><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>"),
    "list and code": ("1. a\n   ```\n   x\n   ```\n2. b", "<ol><li>a[x]</li><li>b</li></ol>"),
    "table": ("|a|b|\n|:-|-:|\n|1|x\\|y|z|",
              '<table><thead><tr><th class="align-start">a</th><th class="align-end">b</th></tr></thead>'
              '<tbody><tr><td class="align-start">1</td><td class="align-end">x|y</td></tr></tbody></table>'),
    "fence": ("```js\n<b>\n\n  *x*\n```\nafter", "[&lt;b&gt;\n\n  *x*]<p>after</p>"),
    "unfinished fence": ("a\n```py\nprint(1)\n``", "<p>a</p>[print(1)\n``]"),
    "link": ("[a *b*](https://x.org/?a=1&b=2 'c')", '<p><a href="https://x.org/?a=1&amp;b=2">a <em>b</em></a></p>'),
    "bare link": ("看https://x.org/a_b。 (https://x.org/c)", '<p>看<a href="https://x.org/a_b">https://x.org/a_b</a>。 '
                  '(<a href="https://x.org/c">https://x.org/c</a>)</p>'),
    "mail": ("<mailto:a@b.org>", '<p><a href="mailto:a@b.org">mailto:a@b.org</a></p>'),
    "image": ("![cat](https://x.org/cat.png)", '<p><a href="https://x.org/cat.png">cat</a></p>'),
    "unsafe links": ("[a](javascript:alert(1)) [b](data:text/html,x) [c](/d) [e](JaVaScRiPt:x) <file:x>",
                     "<p>[a](javascript:alert(1)) [b](data:text/html,x) [c](/d) [e](JaVaScRiPt:x) &lt;file:x&gt;</p>"),
    "line break": ("a<br>b<BR/>c", "<p>a<br>b<br>c</p>"),
    "html": ("<b onclick=x>&amp;", "<p>&lt;b onclick=x&gt;&amp;amp;</p>"),
}  # fmt: skip

# Renders the texts one after the other into one element; code blocks are shown as [code], and directions
# left out, to keep the tables readable.
RENDER = """async (texts) => {
    const { render } = await import("/static/markdown.js");
    const box = document.createElement("div");
    for (const text of texts) render(text, box);
    for (const code of box.querySelectorAll(".code")) code.replaceWith(`[${code.querySelector("code").textContent}]`);
    for (const scroller of box.querySelectorAll("div.table")) scroller.replaceWith(scroller.firstChild);
    for (const link of box.querySelectorAll("a")) {
        if (link.target !== "_blank" || link.rel !== "noopener noreferrer") throw new Error("an open link");
        for (const name of ["target", "rel", "title"]) link.removeAttribute(name);
    }
    for (const directed of box.querySelectorAll("[dir]")) directed.removeAttribute("dir");
    return box.innerHTML;
}"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """One page for all tests: they leave nothing behind."""
    with served(no_model) as port, browser() as chromium:
        page = chromium.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        yield page


def no_model() -> Any:
    raise OSError("The renderer needs no model.")


@pytest.mark.parametrize("name", MARKDOWN)
def test_markdown_becomes_elements(page, name):
    text, expected = MARKDOWN[name]
    assert page.evaluate(RENDER, [text]) == expected


@pytest.mark.parametrize("name", MARKDOWN)
def test_growing_markdown_ends_as_if_it_had_come_at_once(page, name):
    text = "before\n\n" + MARKDOWN[name][0] + "\n\nafter"
    growing = [text[:length] for length in range(1, len(text) + 1)]
    assert page.evaluate(RENDER, growing) == page.evaluate(RENDER, [text])


def test_what_is_finished_is_left_alone_while_an_answer_grows(page):
    kept = page.evaluate(
        """async () => {
            const { render } = await import("/static/markdown.js");
            const box = document.createElement("div");
            render("one\\n\\n```\\ntwo", box);
            const [paragraph, code] = [box.firstChild, box.querySelector("code").firstChild];
            render("one\\n\\n```\\ntwo three\\n```\\n\\nfour", box);
            return paragraph === box.firstChild && code === box.querySelector("code").firstChild && code.data;
        }"""
    )
    assert kept == "two three"


HUGE = [
    "*", "[", "]", "`", "_", "~", "!", ">", "#", "|", "\\", "<", "-", " ", "\n", "\t", "　",
    "* ", "*a ", "**a ", "_a *b ", "*a_b~~", "`a``b", "<https://", "https://[",
    "[](", "[a](", "](", "![a](https://", "[[a](https://x.org)](",
    "- ", "> ", "1. ", "\n- ", "\n  - ", "\n> ", "a|", "|-", "\n|", "\n```",
]  # fmt: skip


@pytest.mark.parametrize("piece", HUGE, ids=repr)
def test_100_kb_of_anything_are_rendered(page, piece):
    """Anything worse than linear would take minutes here, or the stack."""
    text = piece * (100_000 // len(piece))
    page.evaluate(RENDER, [text, f"a|b\n-|-\n{text}"])
