# SPDX-License-Identifier: Apache-2.0
"""Loaders of the evaluation data: HH-RLHF, PKU-SafeRLHF, TruthfulQA, MT-Bench, AlpacaEval and
BeaverTails, in their original file formats.

By default, each loader reads its file below the folder that DUALHEAD_DATA names; ``source`` may
name another file or a hub dataset. Rows are plain dicts whose ``prompt`` is ready to tokenise:
``template`` makes it from the question, by default in HH-RLHF's layout.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..data import (
    ASSISTANT,
    HUMAN,
    DataReport,
    PreferenceData,
    load_preference_data,
    read_jsonl,
    rows_of,
)

Source = str | os.PathLike | None
Template = Callable[[str], str]
Numbered = Iterable[tuple[int, dict[str, Any]]]

# PKU-SafeRLHF's objectives: index of the reward head, and the column with the better response.
HELPFUL, HARMLESS = 0, 1
_PREFERENCES = {HELPFUL: "better_response_id", HARMLESS: "safer_response_id"}

logger = logging.getLogger(__name__)


class Prompts(list):
    """A list of rows; ``report`` says what was skipped."""

    def __init__(self, rows: Iterable[dict[str, Any]], report: DataReport) -> None:
        super().__init__(rows)
        self.report = report


def dialogue(question: str) -> str:
    """HH-RLHF's layout of a first question, up to the start of the assistant's turn."""
    return f"{HUMAN} {question}{ASSISTANT}"


def data_file(name: str) -> Path:
    """A file below the folder that the environment variable DUALHEAD_DATA names.

    Raises:
        FileNotFoundError: the variable is not set, or there is no such file.
    """
    folder = os.environ.get("DUALHEAD_DATA")
    if not folder:
        raise FileNotFoundError(
            f"data_file: {name} is looked for below $DUALHEAD_DATA, which is not set; set it or "
            "give a path or hub name"
        )
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"data_file: there is no file {path} ($DUALHEAD_DATA is {folder})")
    return path


# --- HH-RLHF and PKU-SafeRLHF ---------------------------------------------------------------------


def hh_pairs(source: Source = None, split: str | None = None) -> PreferenceData:
    """Held-out preference pairs of HH-RLHF, with their ``subset`` if the file names it.

    Args:
        source: default ``hh-rlhf/test.jsonl.gz``; otherwise as in :func:`load_preference_data`.
        split: split of a hub dataset or of the embedded sample; default "test".
    """
    if source is None:
        return load_preference_data(data_file("hh-rlhf/test.jsonl.gz"), split)
    if split is None and not os.path.exists(source):
        split = "test"
    return load_preference_data(source, split)


def hh_prompts(source: Source = None, split: str | None = None) -> Prompts:
    """The distinct prompts of :func:`hh_pairs` in order: ``prompt``, ``question`` (the prompt
    without the first "Human:" and the last "Assistant:"), ``chosen`` of the first pair with that
    prompt, and ``subset``.

    A pair's prompt is the common beginning of both dialogues, all of its turns included.
    """
    pairs = hh_pairs(source, split)
    report = DataReport(pairs.report.source, unit="prompts", skipped=dict(pairs.report.skipped))
    rows: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        if not isinstance(pair["prompt"], str):
            raise ValueError(
                f"hh_prompts: {report.source} must hold dialogues as strings, got messages"
            )
        kept = {key: pair[key] for key in ("prompt", "chosen", "subset") if key in pair}
        kept["question"] = pair["prompt"].removesuffix(ASSISTANT).removeprefix(HUMAN).strip()
        rows.setdefault(pair["prompt"], kept)
    report.kept = len(rows)
    return Prompts(rows.values(), report)


def saferlhf_pairs(
    source: Source = None, split: str | None = None, template: Template = dialogue
) -> PreferenceData:
    """PKU-SafeRLHF: two rows for each pair of responses, one per objective. ``objective`` 0 prefers
    the more helpful response, 1 the safer one. The two disagree on many pairs.

    Args:
        source: default ``pku_saferlhf_sample.jsonl``; a .jsonl file or a hub name.
        split: of a hub dataset; default "test".
    Raises:
        ValueError: a column is missing, or an id is neither 0 nor 1; the message names the line.
    """
    source = data_file("pku_saferlhf_sample.jsonl") if source is None else source
    report, kept = DataReport(os.fspath(source)), []
    for line, row in rows_of("saferlhf_pairs", source, split, "test"):
        responses = [row.get("response_0"), row.get("response_1")]
        if not all(isinstance(text, str) for text in (row.get("prompt"), *responses)):
            raise _wrong(report, line, "strings prompt, response_0 and response_1", row)
        if not all(text.strip() for text in responses) or responses[0] == responses[1]:
            report.skip("an empty response or two equal ones", line)
            continue
        for objective, column in _PREFERENCES.items():
            better = row.get(column)
            if isinstance(better, bool) or better not in (0, 1):
                raise _wrong(report, line, f"{column} 0 or 1", row)
            kept.append(
                {
                    "prompt": template(row["prompt"].strip()),
                    "chosen": f" {responses[better].strip()}",
                    "rejected": f" {responses[1 - better].strip()}",
                    "objective": objective,
                }
            )
    report.kept = len(kept)
    _say(report)
    return PreferenceData(kept, report)


# --- TruthfulQA -----------------------------------------------------------------------------------


def truthfulqa(
    source: Source = None, split: str | None = None, template: Template = dialogue
) -> Prompts:
    """TruthfulQA as multiple choice: ``prompt``, ``question``, ``category``, ``type``, ``best``,
    and the tuples ``correct`` and ``incorrect``.

    MC1 chooses between (best, *incorrect), of which the first is right; MC2 divides probability
    between correct and incorrect answers. Answers are split at ";", stripped and deduplicated. An
    answer in both lists is removed from both (two questions, "Unknown"), unless it is the best.

    Args:
        source: default ``truthfulqa.csv``; a .csv file with the same columns, or the hub's
            ``truthfulqa/truthful_qa`` (its configuration "generation").
        split: split of a hub dataset; default "validation".
    Raises:
        ValueError: a column is missing, there is no incorrect answer, or the best answer is not
            among the correct ones; the message names the row.
    """
    source = data_file("truthfulqa.csv") if source is None else source
    report, kept = DataReport(os.fspath(source), unit="questions"), []
    for line, row in _truthfulqa_rows(source, split):
        missing = [name for name in _TRUTHFULQA if row.get(name) is None]
        if missing:
            raise _wrong(report, line, f"columns {', '.join(missing)}", row)
        best, right, wrong = (_answers(row[name]) for name in _TRUTHFULQA[3:])
        if len(best) != 1 or best[0] not in right:
            raise _wrong(report, line, "best_answer to be one of correct_answers", row)
        both = set(right) & set(wrong)
        right = tuple(a for a in right if a not in both or a == best[0])
        wrong = tuple(a for a in wrong if a not in both)
        if not wrong:
            raise _wrong(report, line, "at least one incorrect answer", row)
        question = row["question"].strip()
        kept.append(
            {
                "prompt": template(question),
                "question": question,
                "category": row["category"],
                "type": row["type"],
                "best": best[0],
                "correct": right,
                "incorrect": wrong,
            }
        )
    report.kept = len(kept)
    return Prompts(kept, report)


_TRUTHFULQA = (
    "type",
    "category",
    "question",
    "best_answer",
    "correct_answers",
    "incorrect_answers",
)


def _truthfulqa_rows(source: str | os.PathLike, split: str | None) -> Numbered:
    """The rows, with the columns of a .csv file renamed as on the hub."""
    if not os.fspath(source).endswith(".csv"):
        return rows_of("truthfulqa", source, split, "validation", configuration="generation")
    if split is not None:
        raise ValueError(f"truthfulqa: split must be None for a file, got {split!r}")
    return _csv_rows(source)


def _csv_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            yield number, {str(name).lower().replace(" ", "_"): v for name, v in row.items()}


def _answers(value: str | list[str]) -> tuple[str, ...]:
    parts = value.split(";") if isinstance(value, str) else value
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


# --- MT-Bench, AlpacaEval, BeaverTails ------------------------------------------------------------


def mt_bench(
    source: Source = None, references: Source = None, template: Template = dialogue
) -> Prompts:
    """MT-Bench's questions: ``id``, ``category``, ``prompt`` (of the first turn), ``turns`` (two),
    ``reference`` (the question file's two answers, or None) and ``reference_gpt4`` (GPT-4's
    answers, or None). :func:`second_turn` makes the prompt of the second turn.

    Args:
        source: a file in FastChat's format; default ``mt_bench_questions.jsonl``.
        references: a file of GPT-4's answers in FastChat's format; default
            ``mt_bench_reference_gpt4.jsonl`` if ``source`` is not given, otherwise none.
    Raises:
        ValueError: a question does not have two turns, or an answer has no question.
    """
    if source is None:
        source = data_file("mt_bench_questions.jsonl")
        references = references or data_file("mt_bench_reference_gpt4.jsonl")
    report, kept = DataReport(os.fspath(source), unit="questions"), {}
    for line, row in read_jsonl(source):
        turns = row.get("turns")
        if not isinstance(turns, list) or len(turns) != 2 or "question_id" not in row:
            raise _wrong(report, line, "question_id and two turns", row)
        kept[row["question_id"]] = {
            "id": row["question_id"],
            "category": row.get("category"),
            "prompt": template(turns[0]),
            "turns": tuple(turns),
            "reference": tuple(row["reference"]) if row.get("reference") else None,
            "reference_gpt4": None,
        }
    for line, row in read_jsonl(references) if references is not None else ():
        if row.get("question_id") not in kept:
            raise ValueError(
                f"mt_bench: {references}, line {line}: expected the question_id of a question, "
                f"got {row.get('question_id')!r}"
            )
        kept[row["question_id"]]["reference_gpt4"] = tuple(row["choices"][0]["turns"])
    report.kept = len(kept)
    return Prompts(kept.values(), report)


def second_turn(row: dict[str, Any], answer: str, template: Template = dialogue) -> str:
    """The prompt of an MT-Bench row's second turn, after a system's answer to the first turn."""
    return f"{template(row['turns'][0])} {answer.strip()}{template(row['turns'][1])}"


def alpaca_eval(
    source: Source = None, split: str | None = None, template: Template = dialogue
) -> Prompts:
    """AlpacaEval's instructions: ``prompt``, ``question``, ``dataset``.

    source: default ``alpaca_eval_prompts.jsonl``; a .jsonl file or a hub name (split "eval").
    """
    source = data_file("alpaca_eval_prompts.jsonl") if source is None else source
    rows = rows_of("alpaca_eval", source, split, "eval")
    return _questions(source, rows, "instruction", ("dataset",), template)


def beavertails(
    source: Source = None, split: str | None = None, template: Template = dialogue
) -> Prompts:
    """BeaverTails' evaluation prompts: ``prompt``, ``question``, ``category`` (of harm).

    source: default ``beavertails_eval_prompts.jsonl``; a .jsonl file or a hub name (split "test").
    """
    source = data_file("beavertails_eval_prompts.jsonl") if source is None else source
    rows = rows_of("beavertails", source, split, "test")
    return _questions(source, rows, "prompt", ("category",), template)


def _questions(
    source: str | os.PathLike,
    rows: Numbered,
    column: str,
    keep: tuple[str, ...],
    template: Template,
) -> Prompts:
    """Single questions, stripped and deduplicated."""
    report, kept = DataReport(os.fspath(source), unit="prompts"), {}
    for line, row in rows:
        if not isinstance(row.get(column), str):
            raise _wrong(report, line, f"a string {column}", row)
        question = row[column].strip()
        if not question or question in kept:
            report.skip("empty" if not question else "a repeat", line)
            continue
        extra = {name: row.get(name) for name in keep}
        kept[question] = {"prompt": template(question), "question": question, **extra}
    report.kept = len(kept)
    _say(report)
    return Prompts(kept.values(), report)


def _say(report: DataReport) -> None:
    if not report.kept:
        raise ValueError(f"prompts: no usable row in {report}")
    if report.skipped:
        logger.warning("%s", report)


def _wrong(report: DataReport, line: int, expected: str, row: dict[str, Any]) -> ValueError:
    shown = ", ".join(f"{name}={str(value)[:40]!r}" for name, value in row.items())
    return ValueError(f"{report.source}, line {line}: expected {expected}, got {shown or 'none'}")
