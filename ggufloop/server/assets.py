"""The page's own files, as the server sends them: a fixed list, read from the package, with their security headers.

    asset = read_asset("")                            # the page itself; None for a name that is not one of its files
    asset.content, asset.headers                      # bytes, and the response headers

`/` is the page and `/page/<name>` are its files; the page refers to everything by relative addresses, so it works
behind a prefix too. There is no build step: what is in `page/` is what a browser gets. The content security policy
lets nothing in but these files and the server's own answers, so that text a model writes can never become code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "page"

_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}
"""Of every file of the page. blob: is for figures, which are fetched with the API key and not by their address."""


@dataclass(frozen=True)
class Asset:
    """A file of the page: its bytes and the headers to send it with."""

    content: bytes
    headers: dict[str, str]


def asset_names() -> list[str]:
    """The files below `/page/`."""
    return sorted(path.name for path in FOLDER.iterdir() if path.suffix in _MEDIA and path.name != "index.html")


def read_asset(name: str) -> Asset | None:
    """The file `/page/<name>`, or the page itself for ''; None if there is no such file."""
    if name and name not in asset_names():
        return None
    path = FOLDER / (name or "index.html")
    return Asset(path.read_bytes(), {"Content-Type": _MEDIA[path.suffix], **HEADERS})
