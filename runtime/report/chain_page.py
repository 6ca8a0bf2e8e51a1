"""The page that shows the chain of an artifact; docs/format.md explains its terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import __version__
from runtime.console import human_bytes
from runtime.report.chain import chain_of
from runtime.report.html import CHAIN, own_script, render, write_page

if TYPE_CHECKING:
    from markupsafe import Markup

    from runtime.artifact.manifest import Manifest

_LONGEST_COLORED = 200_000  # characters; longer programs are shown in one color
_LONGEST_SHOWN = 1_000_000


def write_chain(path: Path, manifest: Manifest, sources: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Write the page of an artifact.

    Args:
        path: of the page.
        manifest: of the artifact.
        sources: code by file.
        sizes: of the manifest's dims, for which bytes are computed.

    Raises:
        OutputError: if it cannot be written, or would replace a file that is not a page.
    """
    write_page(path, chain_page(manifest, sources, sizes))


def chain_page(manifest: Manifest, sources: Mapping[str, str], sizes: Mapping[str, int]) -> bytes:
    """Render the page of an artifact."""
    links = chain_of(manifest, sizes)
    largest = max((link.weights_bytes for link in links), default=0)
    context = {
        "title": f"{manifest.model.class_name}: compiled chain",
        "kind": "compiled model",
        "manifest": manifest,
        "links": links,
        "largest": largest or 1,
        "most_kept": max((link.kept_bytes for link in links), default=0) or 1,
        "codes": {file: _colored(sources.get(file, "")) for file in dict.fromkeys(link.file for link in links)},
        "sizes": {name: f"{size:,}" for name, size in sizes.items()},
        "facts": _facts(manifest),
        "seqbuild_version": __version__,
    }
    return render("chain.html.j2", context, generator=CHAIN, data={}, scripts=[own_script("chain.js")])


def _facts(manifest: Manifest) -> dict[str, str]:
    model = manifest.model
    dims = {dim.name: (str(dim.min), "no limit" if dim.max < 0 else str(dim.max)) for dim in manifest.dims}
    return {
        "Model": f"{model.class_name} ({model.model_type}), {model.num_parameters:,} parameters, {model.dtype}",
        "Compiled with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "Input key": manifest.input_key,
        "Targets": f"{len(manifest.targets)} by {', '.join(manifest.target_patterns)}",
        "Valid for": ", ".join(f"{name} from {low} to {high}" for name, (low, high) in dims.items())
        or "these sizes only",
        "Portable": "yes: the host needs no model code" if manifest.is_portable else "no: the host calls model code",
        "Files": f"{len(manifest.files)}, {human_bytes(sum(entry.bytes for entry in manifest.files))}",
    }


def _colored(code: str) -> Markup:
    """Escape a program, with a class for each kind of token."""
    from markupsafe import Markup, escape

    if len(code) > _LONGEST_COLORED:
        shown = code[:_LONGEST_SHOWN]
        rest = f"\n# … {len(code) - len(shown):,} more characters" if len(code) > len(shown) else ""
        return Markup("<pre>{}</pre>").format(f"{shown}{rest}")
    try:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers.python import PythonLexer
    except ImportError:  # it comes with rich
        return Markup("<pre>") + escape(code) + Markup("</pre>")
    formatter: Any = HtmlFormatter(nowrap=True)
    return Markup("<pre>") + Markup(highlight(code, PythonLexer(), formatter)) + Markup("</pre>")
