"""Divide documents into three parts that share no document: training, calibration and evaluation.

The parts depend on the texts alone: within each source the documents are ordered by the SHA-256 of
their text, the first ones go to evaluation, the next ones to calibration, and the rest to training.
Each source contributes to the two small parts in proportion to its size. A document of a small part is
cut to its first `MAX_HELD_OUT_CHARS` characters, at a paragraph's end, so that several documents fit;
what was cut off is dropped, not given to training.

Run as a script, it writes the two small parts:

    python split.py --text FILE.jsonl --out text

Each line of an input or output file is a JSON object {"text": ..., "source": ...}.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

EVAL_CHARS = 120_000
CALIB_CHARS = 250_000
MAX_HELD_OUT_CHARS = 5_000
# A documentation set's generated index (one list of links of several hundred kilobytes) is no prose.
MAX_DOCUMENT_CHARS = 200_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text and the name of the documentation set it comes from."""

    text: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Three parts; no document is in two of them."""

    train: tuple[Document, ...]
    calib: tuple[Document, ...]
    eval: tuple[Document, ...]


def read_documents(paths: Iterable[Path]) -> list[Document]:
    """All documents of the files, in order, without generated indices and exact duplicates."""
    texts: dict[str, Document] = {}
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                document = Document(text=record["text"], source=record["source"])
                if len(document.text) <= MAX_DOCUMENT_CHARS:
                    texts.setdefault(document.text, document)
    return list(texts.values())


def write_documents(documents: Iterable[Document], path: Path) -> None:
    """Write one JSON object a line, as `read_documents` reads them."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            record = {"text": document.text, "source": document.source}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def split_documents(documents: Sequence[Document]) -> Split:
    """Divide by content: neither the order of the documents nor a random seed matters."""
    total_chars = sum(len(document.text) for document in documents)
    train: list[Document] = []
    calib: list[Document] = []
    evaluation: list[Document] = []
    for source in sorted({document.source for document in documents}):
        pool = sorted((d for d in documents if d.source == source), key=_content_hash)
        share = sum(len(document.text) for document in pool) / total_chars
        evaluation += _take(pool, int(EVAL_CHARS * share))
        calib += _take(pool, int(CALIB_CHARS * share))
        train += pool
    return Split(
        train=tuple(sorted(train, key=_content_hash)),
        calib=tuple(sorted(calib, key=_content_hash)),
        eval=tuple(sorted(evaluation, key=_content_hash)),
    )


def _take(pool: list[Document], num_chars: int) -> list[Document]:
    """Remove documents from the front of `pool` until their cut texts hold `num_chars` characters."""
    taken: list[Document] = []
    while pool and num_chars > 0:
        whole = pool.pop(0)
        text = _cut(whole.text, min(MAX_HELD_OUT_CHARS, max(num_chars, 1_000)))
        taken.append(Document(text=text, source=whole.source))
        num_chars -= len(text)
    return taken


def _cut(text: str, max_chars: int) -> str:
    """At most `max_chars` characters, ending where a paragraph ends if one ends in the second half."""
    if len(text) <= max_chars:
        return text
    end = text.rfind("\n\n", max_chars // 2, max_chars)
    return text[: end if end > 0 else max_chars].rstrip()


def _content_hash(document: Document) -> str:
    return hashlib.sha256(document.text.encode()).hexdigest()


def main() -> None:
    """Write `calib.jsonl` and `eval.jsonl`."""
    parser = argparse.ArgumentParser(description="Write the calibration and the evaluation texts.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    split = split_documents(read_documents(arguments.text))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("calib", split.calib), ("eval", split.eval)):
        path = arguments.out / f"{name}.jsonl"
        write_documents(part, path)
        print(f"{path}: {len(part)} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
