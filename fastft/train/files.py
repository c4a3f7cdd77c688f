"""Reading a user's examples from ``.jsonl``, ``.json`` or ``.csv``, with errors that name the
line and the columns that were found."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.errors import DataError, nearest

__all__ = ["Example", "read_examples"]

SUFFIXES = (".jsonl", ".json", ".csv")
ROLES = ("system", "user", "assistant", "tool")
# Python's csv module refuses longer ones than 128 KiB, if it is not told.
LONGEST_FIELD = 2**31 - 1
COLUMNS = "'messages', 'prompt' and 'completion', or 'text'"


@dataclass(frozen=True)
class Example:
    """One example: a conversation, a prompt with its completion, or plain text; ``where`` it was
    read, for errors."""

    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    where: str = field(default="data", compare=False)

    def as_messages(self) -> list[dict[str, str]]:
        """The conversation; a prompt and its completion are one of two turns."""
        if self.messages is not None:
            return self.messages
        return [
            {"role": "user", "content": self.prompt or ""},
            {"role": "assistant", "content": self.completion or ""},
        ]


def read_examples(path: str | Path) -> list[Example]:
    """All examples of a file, in its order.

    Each row has ``messages`` (a list of ``{"role", "content"}`` with at least one assistant turn;
    in a CSV, that list as JSON), ``prompt`` and ``completion``, or ``text``. Other columns are
    not read. Raises ``DataError``.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            str(path),
            "data",
            expected=f"a file ending in {', '.join(SUFFIXES)}",
            got=f"{path.suffix!r}" if path.suffix else "no ending",
        )
    usual = csv.field_size_limit(LONGEST_FIELD)
    try:
        rows = list(_rows(path))
    except UnicodeDecodeError as error:
        raise DataError(
            str(path), "data", expected="UTF-8 text", got=f"bytes that are not ({error.reason})"
        ) from error
    except OSError as error:
        raise DataError(str(path), "data", expected="a readable file", got=str(error)) from error
    finally:
        csv.field_size_limit(usual)
    if not rows:
        raise DataError(str(path), "data", expected="at least one example", got="an empty file")
    return [_example(row, f"{path}:{line}") for line, row in rows]


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """``(line or position, row)``; utf-8-sig also reads files with a byte order mark."""
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Strict: else a quote that is not closed makes one example of all rows to the next one.
            reader = csv.DictReader(file, strict=True)
            begins = 1
            try:
                if reader.fieldnames:
                    begins = reader.line_num + 1
                for row in reader:
                    yield reader.line_num, row
                    begins = reader.line_num + 1
            except csv.Error as error:
                raise DataError(
                    f"{path}:{begins}", "row", expected="a row of a CSV file", got=str(error),
                    remedy="Is a quote not closed, or not doubled within a field?",
                ) from error  # fmt: skip
        return
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".jsonl":
        # Not splitlines(): JSON may hold U+2028 unescaped, which that would split at.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, _parse(line, f"{path}:{number}")
        return
    rows = _parse(text, str(path))
    if not isinstance(rows, list):
        raise DataError(
            str(path), "data", expected="a list of examples", got=f"a {type(rows).__name__}"
        )
    yield from enumerate(rows, start=1)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # nested too deeply
        lines = where.endswith(".json") and str(error).startswith("Extra data")
        raise DataError(
            where, "data", expected="valid JSON", got=str(error),
            remedy="Name it .jsonl if each line is an example." if lines else None,
        ) from error  # fmt: skip


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise DataError(
            where, "example", expected=f"an object with {COLUMNS}", got=f"a {type(row).__name__}"
        )
    # csv.DictReader puts surplus fields under the key None, and None where fields are missing.
    if None in row:
        raise DataError(where, "row", expected="as many fields as the header", got="more")
    if row.get("messages") is not None:
        return Example(messages=_messages(row["messages"], where), where=where)
    if row.get("prompt") is not None and row.get("completion") is not None:
        return Example(
            prompt=_text(row["prompt"], "prompt", where),
            completion=_text(row["completion"], "completion", where, filled=True),
            where=where,
        )
    if row.get("text") is not None:
        return Example(text=_text(row["text"], "text", where, filled=True), where=where)
    for columns in (("prompt", "completion"), ("text",)):
        if row.keys() >= set(columns):
            name = next(name for name in columns if row[name] is None)
            raise DataError(where, name, expected="a text", got="nothing")
    names = ("messages", "prompt", "completion", "text")
    hints = [hint for key in row if key not in names and (hint := nearest(str(key), names))]
    raise DataError(
        where,
        "columns",
        expected=COLUMNS,
        got=", ".join(repr(key) for key in row) or "no columns",
        remedy=hints[0] if hints else "Rename the columns.",
    )


def _text(value: Any, name: str, where: str, filled: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(where, name, expected="a text", got=f"a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair
        raise DataError(where, name, expected="Unicode text", got=str(error)) from error
    if filled and not value.strip():
        raise DataError(where, name, expected="a text that is not empty", got="an empty one")
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        value = _parse(value, where)
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            "messages",
            expected="a list of messages",
            got="an empty list" if value == [] else f"a {type(value).__name__}",
        )
    messages: list[dict[str, str]] = []
    for number, message in enumerate(value, start=1):
        place = f"messages[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise DataError(where, place, expected="'role' and 'content'", got=str(found))
        role = message["role"]
        if role not in ROLES:
            raise DataError(
                where,
                place,
                expected=f"a role among {', '.join(ROLES)}",
                got=repr(role),
                remedy=nearest(str(role), ROLES) or None,
            )
        content = _text(message["content"], f"{place}.content", where)
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            where,
            "messages",
            expected="at least one assistant turn to learn",
            got=", ".join(message["role"] for message in messages),
        )
    return messages
