"""The found pictures as a page that needs no network, and as one PNG."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from infra.pictures import PictureError, decode_picture

CELL_PX, TEXT_PX, GAP_PX, COLUMNS = 256, 44, 8, 4
CSP = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)
"""Nothing is fetched and no script runs, whatever a document's words are: as in the report's page."""

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; background: #fafafa; color: #222; }
main { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 1rem; }
figure { margin: 0; background: #fff; border-radius: 6px; overflow: hidden; box-shadow: 0 1px 4px #0002; }
figure img { width: 100%; aspect-ratio: 4/3; object-fit: cover; display: block; }
figcaption { padding: .5rem .7rem; } small { color: #777; overflow-wrap: anywhere; }
header img { height: 8rem; border-radius: 6px; }
"""


def picture_page(title: str, rows: Sequence[dict[str, Any]], query_image: bytes | None) -> bytes:
    """One self-contained HTML file; all text of the documents is escaped."""
    asked = f'<p><img alt="the query" src="{_data_uri(query_image)}"></p>' if query_image else ""
    figures = "\n".join(_figure(row) for row in rows) or "<p>Nothing was found.</p>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{CSP}<title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><body><header><h1>{html.escape(title)}</h1>{asked}</header>"
        f'<main style="--columns: {COLUMNS}">\n{figures}\n</main></body></html>\n'
    ).encode()


def _figure(row: dict[str, Any]) -> str:
    text, source = html.escape(row["text"] or ""), html.escape(row["source_uri"] or "")
    licence = f" · {html.escape(row['licence'])}" if row.get("licence") else ""
    return (
        f'<figure><img alt="{text}" src="{_data_uri(row["image"])}"><figcaption><b>{row["rank"]}</b> {text}'
        f"<br><small>{row['score']:.4f} · {source}{licence}</small></figcaption></figure>"
    )


def _data_uri(image: bytes | None) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(image or b"").decode()


def picture_grid(rows: Sequence[dict[str, Any]]) -> bytes:
    """The pictures in reading order with their rank and words, as PNG."""
    lines = max(1, -(-len(rows) // COLUMNS))
    width = COLUMNS * (CELL_PX + GAP_PX) + GAP_PX
    sheet = Image.new("RGB", (width, lines * (CELL_PX + TEXT_PX + GAP_PX) + GAP_PX), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, row in enumerate(rows):
        left = GAP_PX + place % COLUMNS * (CELL_PX + GAP_PX)
        top = GAP_PX + place // COLUMNS * (CELL_PX + TEXT_PX + GAP_PX)
        sheet.paste(_cell(row["image"]), (left, top))
        for line, text in enumerate(_two_lines(f"{row['rank']}  {row['text'] or ''}", font)):
            pen.text((left, top + CELL_PX + 4 + 18 * line), text, fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _cell(image: bytes | None) -> Image.Image:
    cell = Image.new("RGB", (CELL_PX, CELL_PX), "#eee")
    try:
        picture = decode_picture(image or b"")
    except PictureError:
        return cell
    picture.thumbnail((CELL_PX, CELL_PX))
    cell.paste(picture, ((CELL_PX - picture.width) // 2, (CELL_PX - picture.height) // 2))
    return cell


def _two_lines(text: str, font: Any) -> list[str]:
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL_PX:
            lines[-1] = longer
        else:
            lines.append(word[:40])
    return lines[:2]
