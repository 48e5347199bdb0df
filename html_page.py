"""One HTML page that holds all it shows: pictures travel inside it, it has no scripts, and it asks no network.

What is shown was written by models, and by whoever wrote a file. It reaches the page through `escape` only; should
something get past that, the page's content policy forbids it to load or run anything.
"""

import base64
import html
import io
import json
import os
import unicodedata
import warnings

from PIL import Image

from lazy_puzzles import Shown, check_lazy, is_lazy, open_puzzle, pictures_of

MOST_PIXELS = 2**26  # of a picture that is decoded
MOST_IMAGES = 4  # of a question
IMAGE_SIDE = 224  # pixels of a picture on the page
REPLY_CHARACTERS = 1500
NAME_CHARACTERS = 120  # of a cell, a heading, a file's name

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1rem 4rem; background: #fcfcfa; color: #1d2733;
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .3rem; border-bottom: 2px solid #d9dee5; padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .4rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: #005a9c; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; background: #fff; }
th, td { padding: .35rem .7rem; border: 1px solid #d9dee5; text-align: right; white-space: nowrap; }
th { background: #eef2f6; font-weight: 600; }
tr > :first-child { text-align: left; position: sticky; left: 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .8rem; }
figure { margin: 0; padding: .5rem; background: #fff; border: 1px solid #d9dee5; border-radius: 6px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #4a5664; }
.puzzle { margin: 1rem 0; padding: .8rem; background: #fff; border: 1px solid #d9dee5; border-radius: 6px;
  display: grid; grid-template-columns: minmax(0, 1fr); gap: .8rem; }
.puzzle img { max-width: 100%; width: 224px; height: auto; image-rendering: auto; border: 1px solid #d9dee5; }
@media (min-width: 48rem) { .puzzle { grid-template-columns: 240px minmax(0, 1fr); } }
pre { margin: .2rem 0 .7rem; padding: .5rem .6rem; background: #f4f6f8; border-left: 4px solid #9aa7b5;
  border-radius: 3px; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: .85rem/1.45 ui-monospace, Consolas, monospace; }
pre.right { border-color: #009e73; } pre.wrong { border-color: #d55e00; }
.stage { font-size: .9rem; overflow-wrap: anywhere; }
.score { color: #4a5664; }
.right-word { color: #00694d; font-weight: 600; }
.wrong-word { color: #a34700; font-weight: 600; }
summary { cursor: pointer; color: #005a9c; font-size: .9rem; }
"""


# ---------------------------------------------------------------------------------------------------------------------
# Text


def visible(value: object, most: int = REPLY_CHARACTERS) -> str:
    """Text that shows what it holds: invisible characters spelled out, truncated at `most` characters.

    Replies are whatever a model produced, names whatever a file holds: half a surrogate pair, which no file can be
    written with; marks that turn the line's direction; sequences that clear a terminal.
    """
    text = value if isinstance(value, str) else json.dumps(value)
    more = f" … ({len(text) - most} more characters)" if len(text) > most else ""
    shown = []
    for character in text[:most]:
        # Category C: control, format, surrogate and unassigned characters.
        if unicodedata.category(character)[0] == "C" and character not in "\n\t":
            character = f"⟨U+{ord(character):04X}⟩"
        shown.append(character)
    return "".join(shown) + more


def visible_name(text: str, most: int = NAME_CHARACTERS) -> str:
    """A name on one line."""
    return " ".join(visible(text, most).split())


def escape(value: object, most: int = REPLY_CHARACTERS) -> str:
    """`visible` text for the page: its markup is made harmless."""
    return html.escape(visible(value, most), quote=True)


def table_html(table: list[list[str]]) -> str:
    """The same cells as an HTML table."""
    head = "".join(f'<th scope="col">{escape(visible_name(cell))}</th>' for cell in table[0])
    body = ""
    for title, *cells in table[1:]:
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{escape(visible_name(title))}</th>{values}</tr>'
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def png_bytes(image: Image.Image, colours: int = 0) -> bytes:
    """PNG bytes; with `colours` > 0 reduced to that many: a line drawing loses nothing by it."""
    if colours:
        image = image.convert("RGB").quantize(colours)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def img_tag(png: bytes, alt: str) -> str:
    """An <img> with the picture inside it, as a data URI. alt: plain text, escaped here."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def figure_html(png: bytes, alt: str, caption: str) -> str:
    """A curve's figure. alt and caption: plain text, escaped here."""
    return f"<figure>{img_tag(png, alt)}<figcaption>{escape(caption)}</figcaption></figure>"


def pictures_html(record: dict) -> str:
    """The first pictures of a question. record: "id", "images" as absolute paths, and a lazy one's "puzzle"."""
    try:
        if is_lazy(record):
            check_lazy(record)
        return "".join(picture_html(shown, record["id"]) for shown in pictures_of(record)[:MOST_IMAGES])
    except ValueError:
        return "<p>The puzzle cannot be made.</p>"


def picture_html(shown: Shown, question_id: str) -> str:
    """A question's picture made small, or a note that it is gone or cannot be shown."""
    path = shown.path
    name = escape(visible_name(os.path.basename(path)))
    # Not a pipe either, which would be waited for.
    if not os.path.isfile(path):
        return f"<p>The picture {name} is no longer there.</p>"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
        if width * height > MOST_PIXELS:
            return f"<p>The picture {name} is too large to be shown.</p>"
        image = open_puzzle(shown)[shown.number]
    except Image.DecompressionBombError:
        return f"<p>The picture {name} is too large to be shown.</p>"
    except Exception:
        # Pillow's readers raise whatever their parsing meets, on a file that anybody may have made.
        return f"<p>The picture {name} cannot be read.</p>"
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    alt = f"Picture of question {visible_name(question_id)}, {image.width} by {image.height} pixels as shown"
    return img_tag(png_bytes(image), alt)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def document(title: str, top: str, sections: list[tuple[str, str, str, str]], style: str = "") -> str:
    """The whole page. top: HTML under its title; sections: (anchor, title, words, content), the last two HTML; style:
    CSS beyond the page's own."""
    links, body = "", ""
    for anchor, heading, words, content in sections:
        links += f'<a href="#{anchor}">{heading}</a>'
        body += f'<h2 id="{anchor}">{heading}</h2><p>{words}</p>{content}'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # Even if some reply got past the escaping: the page may load nothing and run nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}{style}</style></head><body><h1>{title}</h1>{top}<nav>{links}</nav>{body}</body></html>\n"
    )
