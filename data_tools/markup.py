"""HTML, reStructuredText, man pages and METADATA as plain text with Markdown's headings and code fences."""

import re
from email import message_from_string
from html.parser import HTMLParser

_SKIPPED = {"script", "style", "nav", "header", "footer", "noscript", "template", "svg", "form"}
_BLOCKS = {"p", "div", "section", "article", "li", "ul", "ol", "table", "tr", "br", "dd", "dt", "blockquote", "main"}
_UNDERLINE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}\s*$")

_ESCAPE = re.compile(r"\\(?:f(?:\[.*?\]|\(..|.)|s[+-]?\d|[&|^/,%:c]|\((..)|\[(.*?)\]|(.))")
_SIGNS = {"aq": "'", "dq": '"', "lq": '"', "rq": '"', "em": "-", "en": "-", "bu": "-", "ha": "^", "ti": "~", "rs": "\\"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.title: list[str] = []
        self._skipped, self._code, self._in_title = 0, 0, False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in _SKIPPED:
            self._skipped += 1
        elif tag == "title":
            self._in_title = True
        elif re.fullmatch("h[1-6]", tag):
            self.parts.append("\n\n" + "#" * int(tag[1]) + " ")
        elif tag == "pre":
            self._code += 1
            self.parts.append("\n\n```\n")
        elif tag in _BLOCKS:
            self.parts.append("\n" if tag in ("li", "tr", "br") else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED:
            self._skipped = max(0, self._skipped - 1)
        elif tag == "title":
            self._in_title = False
        elif tag == "pre" and self._code:
            self._code -= 1
            self.parts.append("\n```\n\n")
        elif re.fullmatch("h[1-6]", tag) or tag in _BLOCKS:
            self.parts.append("\n\n" if tag not in ("li", "tr", "br") else "\n")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title.append(data)
        elif not self._skipped:
            self.parts.append(data if self._code else re.sub(r"\s+", " ", data))


def html_to_text(html: str) -> tuple[str, str]:
    """(title, text): the page's own title, if it has one; scripts, styles and navigation are left out."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    text = "\n".join(line.rstrip() for line in "".join(reader.parts).splitlines())
    return " ".join("".join(reader.title).split()), re.sub(r"\n{3,}", "\n\n", text).strip()


def rst_to_text(rst: str) -> str:
    """Underlined titles become Markdown headings, their depth in order of appearance, as in docutils."""
    lines, out, depths = rst.splitlines(), [], dict[tuple[str, bool], int]()
    place = 0
    while place < len(lines):
        line, following = lines[place], lines[place + 1] if place + 1 < len(lines) else ""
        over = bool(_UNDERLINE.match(line)) and place + 2 < len(lines) and bool(_UNDERLINE.match(lines[place + 2]))
        title, mark = (following, lines[place + 2]) if over else (line, following)
        found = _UNDERLINE.match(mark)
        if found and title.strip() and not _UNDERLINE.match(title) and len(mark.rstrip()) >= len(title.strip()):
            depth = depths.setdefault((found[1], over), len(depths) + 1)
            out.append("#" * min(depth, 6) + " " + title.strip())
            place += 3 if over else 2
        else:
            out.append(line)
            place += 1
    return "\n".join(out)


_LAYOUT = ("TH", "Dd", "Dt", "Os", "RS", "RE", "PD", "Bl", "El", "Bd", "Ed", "Sm")  # requests without words of the page


def man_to_text(roff: str) -> tuple[str, str]:
    """(title, text) of a manual page in man or mdoc: its line under NAME, and its sections with headings."""
    out = list[str]()
    for line in roff.splitlines():
        request = re.match(r"[.'] *(\w+) *(.*)|[.'].*", line)
        name, words = (request[1] or "", (request[2] or "").replace('"', "")) if request else ("", line)
        if name in ("SH", "Sh", "SS", "Ss"):
            out += ["", ("# " if name[1] in "Hh" else "## ") + _signs(words), ""]
        elif request and name in ("TP", "PP", "P", "LP", "HP", "Pp"):
            out.append("")  # what may follow is a width
        elif request and name in ("IP", "It"):
            mark = re.match(r'"([^"]*)"|\S*', request[2] or "")  # a width follows it
            out += ["", _signs(words if name == "It" or not mark else mark[1] or mark[0].strip('"'))]
        elif not request or (name[:1].isupper() and name not in _LAYOUT):
            out.append(_signs(words))  # requests in small letters set type
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()
    named = re.match(r"# NAME\s+(.+(?:\n.+)*)", text, re.IGNORECASE)
    return " ".join(named[1].split()) if named else "", text


def _signs(text: str) -> str:
    return _ESCAPE.sub(lambda found: found[3] or _SIGNS.get(found[1] or found[2] or "", ""), text)


def metadata_to_text(metadata: str) -> tuple[str, str]:
    """(name and summary, description) of an installed package's METADATA."""
    facts = message_from_string(metadata)
    text = str(facts.get_payload())
    if "markdown" not in facts.get("Description-Content-Type", ""):
        text = rst_to_text(text)
    return f"{facts['Name']}: {facts['Summary']}", text
