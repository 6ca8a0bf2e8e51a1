"""Tasks of lm-eval with data of their own, made from texts: no data set has to be downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Like hellaswag: endings of several tokens, each a request of its own.
ENDINGS = """
task: local_endings
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/endings.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_target: label
doc_to_choice: endings
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
# Like mmlu: letters after a question, which share one sequence, and examples before it.
SUBJECT = """
task: local_subject_NAME
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/NAME.jsonl, dev: DATA/NAME_dev.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: dev
fewshot_config: {sampler: first_n}
num_fewshot: 2
description: "The following are questions about NAME.\\n\\n"
doc_to_text: "{{context}}\\nA. {{endings[0]}}\\nB. {{endings[1]}}\\nC. {{endings[2]}}\\nD. {{endings[3]}}\\nAnswer:"
doc_to_target: label
doc_to_choice: ["A", "B", "C", "D"]
metric_list: [{metric: acc}]
"""
GROUP = """
group: local_subjects
task: [local_subject_first, local_subject_second]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
# Like lambada: the last word of a text, given all others.
LAST_WORD = """
task: local_last_word
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/last_word.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + word}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
# Like wikitext: whole texts, longer than the model's context.
PAGES = """
task: local_pages
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/pages.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
# No context, or one that ends with spaces, and choices without a space before them.
BARE = """
task: local_bare
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/bare.jsonl}}
output_type: multiple_choice
test_split: test
target_delimiter: ""
doc_to_text: "{{context}}"
doc_to_target: label
doc_to_choice: endings
metric_list: [{metric: acc}]
"""
GENERATED = """
task: local_generated
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/endings.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{endings[0]}}"
generation_kwargs: {until: ["."]}
metric_list: [{metric: exact_match}]
"""
TASKS = ("local_endings", "local_subjects", "local_last_word", "local_pages", "local_bare")


def write_tasks(folder: Path, texts: Sequence[str], count: int = 12) -> Path:
    """Write task files and their data; returns the directory for --include-path."""
    data, files = folder / "data", folder / "tasks"
    data.mkdir(parents=True)
    files.mkdir()
    words = [text.split() for text in texts if len(text.split()) > 80]
    starts = [(words[number % len(words)], 7 * number % 40) for number in range(4 * count)]
    questions = [_question(own, start, 8 + start, starts) for own, start in starts[:count]]
    _write(data / "endings.jsonl", questions)
    for name, part in (("first", starts[count : 2 * count]), ("second", starts[2 * count : 3 * count])):
        subject = [_question(own, start, 5, starts) for own, start in part]
        _write(data / f"{name}.jsonl", subject[3:])
        _write(data / f"{name}_dev.jsonl", subject[:3])
        (files / f"{name}.yaml").write_text(SUBJECT.replace("NAME", name).replace("DATA", str(data)))
    last = [{"context": " ".join(own[start : start + 20]), "word": own[start + 20]} for own, start in starts[:count]]
    _write(data / "last_word.jsonl", last)
    _write(data / "pages.jsonl", [{"text": text} for text in texts[:3]])
    bare = [{**one, "context": ["", one["context"] + "  ", "So "][number % 3]} for number, one in enumerate(questions)]
    _write(data / "bare.jsonl", bare)
    for name, text in (("endings", ENDINGS), ("group", GROUP), ("last_word", LAST_WORD), ("pages", PAGES)):
        (files / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    for name, text in (("bare", BARE), ("generated", GENERATED)):
        (files / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return files


def _question(own: list[str], start: int, length: int, others: list[tuple[list[str], int]]) -> dict[str, Any]:
    """A context of some words, and four endings of which one is right."""
    endings = [own[start + length : start + length + 6]]
    endings += [
        words[begin + 3 : begin + 4 + index * 3] for index, (words, begin) in enumerate(others[start % 9 :][:3])
    ]
    label = start % 4
    endings[0], endings[label] = endings[label], endings[0]
    return {
        "context": " ".join(own[start : start + length]),
        "endings": [" ".join(words) for words in endings],
        "label": label,
    }


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
