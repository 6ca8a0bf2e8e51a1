"""Write pages: one HTML file with its styles, scripts and data, which may load nothing and run no other script."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from runtime.errors import OutputError
from runtime.host.publish import disk_errors, require_writable, write_file
from runtime.host.regular_files import open_regular, reason_of
from runtime.report import wording
from runtime.report.facts import text_of

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")
REPORT, CHAIN, SEARCH = "seqbuild report", "seqbuild inspect", "seqbuild search"
_GENERATOR = '<meta name="generator" content="'
_HEAD_BYTES = 4096
_SPECIAL = (b"<", b">", b"&", "\u2028".encode(), "\u2029".encode())


def embedded(value: Any) -> str:
    """Encode a value as JSON that contains no character with a meaning in HTML."""
    data = msgspec.json.encode(value)
    for character in _SPECIAL:
        data = data.replace(character, b"\\u%04x" % ord(character.decode()))
    return data.decode()


def plotly_script() -> bytes:
    """Return plotly.js, from the installed package, which is not imported.

    Raises:
        OutputError: if the package is missing or has no such file.
    """
    spec = importlib.util.find_spec("plotly")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [Path(place) / "package_data" / "plotly.min.js" for place in places]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise OutputError("the charts of a page require plotly, which is not installed", hint="pip install 'plotly>=6'")
    return found.read_bytes()


def own_script(name: str) -> bytes:
    """Return a script of this package."""
    return (TEMPLATES / name).read_bytes()


def render(
    template: str, context: Mapping[str, Any], *, generator: str, data: Mapping[str, str], scripts: Sequence[bytes]
) -> bytes:
    """Render a page.

    Args:
        template: the name of its file.
        context: for the template; every text is escaped.
        generator: the kind of page, by which `require_replaceable` recognizes it.
        data: JSON by the id of its element, as `embedded` returns it.
        scripts: that run, and no other.
    """
    from markupsafe import Markup

    clean = [script.replace(b"\r\n", b"\n").replace(b"\r", b"\n") for script in scripts]
    assert not any(b"</script" in script for script in clean), "a script would end its own element"
    theme = own_script("theme.js")
    fixed = {
        "policy": _policy([theme, *clean]),
        "generator": generator,
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "theme_script": Markup(theme.decode()),
        "embedded": {name: Markup(text) for name, text in data.items()},
    }
    page = _environment().get_template(template).render({**context, **fixed})
    ends = [b"\n<script>" + script + b"</script>" for script in clean]
    return b"".join([page.encode("utf-8", errors="replace"), *ends, b"\n</body>\n</html>\n"])


@functools.cache
def _environment() -> Environment:
    """The templates, each compiled once."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _filters()
    return environment


def _policy(scripts: Sequence[bytes]) -> str:
    """The policy of a page: nothing is loaded, and only these scripts run. Heat maps are images in the page itself."""
    digests = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def is_page(path: Path, generator: str | None = None) -> bool:
    """Whether a file is a page that this package has written, of one kind or of any.

    Raises:
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(_HEAD_BYTES)
    kinds = (REPORT, CHAIN, SEARCH) if generator is None else (generator,)
    return head[:15].lower() == b"<!doctype html>" and any(f'{_GENERATOR}{kind}"'.encode() in head for kind in kinds)


def require_replaceable(path: Path) -> None:
    """Require that a page can be written, before the work that it describes: a file of other content is kept.

    Raises:
        OutputError: naming the file.
    """
    with disk_errors(path):
        if not path.is_symlink() and not path.exists():
            require_writable(path)
            return
    try:
        is_own = path.is_file() and is_page(path)
    except OSError as error:
        raise OutputError(f"cannot read {path}: {reason_of(error)}", hint="choose another file for the page") from error
    if not is_own:
        raise OutputError(
            f"{path} exists and is not a page of seqbuild, so it is not replaced",
            hint="choose another file for the page, or remove it",
        )
    require_writable(path)


def write_page(path: Path, page: bytes) -> None:
    """Write a page atomically.

    Raises:
        OutputError: if it cannot be written.
    """
    require_replaceable(path)
    write_file(path, page)


def _filters() -> dict[str, Any]:
    """What templates call on values."""
    return {
        "bytes": wording.bytes_text,
        "count": wording.count_text,
        "dotted": dotted,
        "error": wording.error_text,
        "number": wording.number_text,
        "seconds": wording.seconds_text,
        "size": wording.size_text,
        "without_prefix": without_prefix,
    }


def dotted(name: str) -> Any:
    """A name that may break after its dots."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def without_prefix(line: str) -> str:
    """A warning without the word that its heading has."""
    return text_of(line.removeprefix("warning: "))
