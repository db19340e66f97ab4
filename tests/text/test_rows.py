"""Reading prompts from files."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_lens.errors import DataError
from moe_lens.files import digest_of_file
from moe_lens.text.rows import read_prompts

CHAT = [{"role": "user", "content": 'Hi, "you"\nthere'}]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_holds_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "first prompt\n\n  second, {odd} ünïcode \n")
    assert read_prompts(path) == ["first prompt", "  second, {odd} ünïcode "]


def test_a_jsonl_file_holds_text_chats_tokens_and_objects(tmp_path: Path) -> None:
    records: list[Any] = [
        "text",
        CHAT,
        [5, 6, 7],
        {"prompt": "a", "id": 3},
        {"messages": CHAT},
        {"text": "b"},
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(json.dumps(record) for record in records) + "\n\n")
    assert read_prompts(path) == ["text", CHAT, [5, 6, 7], "a", CHAT, "b"]


def test_a_named_column_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps({"prompt": "a", "other": "b"}))
    assert read_prompts(path, column="other") == ["b"]
    path = write(tmp_path / "p.csv", 'prompt,other\n"a, with comma",b\nNA,007\n')
    assert read_prompts(path) == ["a, with comma", "NA"]
    assert read_prompts(path, column="other") == ["b", "007"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.json", "[]", ".txt, .jsonl and .csv"),
        ("p", "text", ".txt, .jsonl and .csv"),
        ("p.jsonl", '"a"\n"half \\ud83d"', r"line 2 holds '\\ud83d' at character 6"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "\\udc00"}]}', "line 1 holds"),
        ("p.csv", "\n\n", "holds no prompts"),
        ("p.jsonl", '"a"\n{', "line 2 is no JSON"),
        ("p.jsonl", '"a"\n{"id": 1}', "line 2 has no prompt or messages or text, only id"),
        ("p.jsonl", '{"prompt": 3}', "line 1: a prompt is text"),
        ("p.jsonl", '""', "line 1: a prompt is text"),
        ("p.csv", "", "holds no prompts"),
        ("p.csv", "id\n1\n", "line 2 has no prompt"),
        ("p.csv", "prompt,x\na,1\n,2\n", "line 3: the prompt is empty"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(name: str, text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_prompts(write(tmp_path / name, text))


@pytest.mark.parametrize("name", ["p.TXT", "p.Txt", "p.CSV", "p.JSONL"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_endings_marks_and_empty_lines_do_not_matter(name: str, line_end: str, tmp_path: Path) -> None:
    """As other systems write files: capitals, a byte order mark, their line ends, lines without anything."""
    lines = {"p.CSV": ["prompt", "", "ünïcode", "", "b"], "p.JSONL": ["", '"ünïcode"', "  ", '"b"', ""]}
    text = line_end.join(lines.get(name, ["", "ünïcode", "", " ", "b", ""]))
    path = tmp_path / name
    path.write_bytes(("\ufeff" + text).encode())
    assert read_prompts(path) == ["ünïcode", "b"]


def test_a_whole_character_in_two_escapes_is_read(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "p.jsonl", '"\\ud83d\\ude00"')) == ["\U0001f600"]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.CSV"])
def test_a_folder_and_another_encoding_are_no_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / name)
    other = tmp_path / f"utf16{name}"
    other.write_bytes("prompt\nünïcode".encode("utf-16"))
    with pytest.raises(DataError, match="in UTF-8"):
        read_prompts(other)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_prompts, digest_of_file):
        with pytest.raises(DataError, match=r"none\.txt cannot be read"):
            read(tmp_path / "none.txt")


def test_the_digest_changes_with_the_content(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", "x"), write(tmp_path / "b", "y")
    assert digest_of_file(first) != digest_of_file(second)
    assert digest_of_file(first) == digest_of_file(write(tmp_path / "c", "x"))
