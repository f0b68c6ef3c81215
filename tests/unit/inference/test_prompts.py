"""Prompts from files and data sets."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ecdit_ds.inference.prompts import read_dataset_prompts, read_prompt_file
from tests.helpers.arrow_damage import damage_places

RefusalOf = Callable[[Callable[[], object]], str]

CAPTIONS = ["a red seven", "zwei grüne\nFünfen", "a 'quoted', \"comma\""]


def write(path: Path, text: str | bytes) -> Path:
    """Write a file and return it."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a nine\ntwo sixes\n", ["a nine", "two sixes"]),
        ("a nine", ["a nine"]),
        ("\n  a nine \t\r\n\n\r\ntwo sixes\r\n", ["a nine", "two sixes"]),
        ("\ufeffa nine\n", ["a nine"]),
        ("one\u2028line\n", ["one\u2028line"]),
        ('{"prompt": "a nine"}\n', ['{"prompt": "a nine"}']),
    ],
)
def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path, text: str, prompts: list[str]) -> None:
    assert read_prompt_file(write(tmp_path / "p.txt", text)) == [(prompt, None) for prompt in prompts]


def test_json_lines_hold_prompts_with_or_without_seeds(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a nine", "seed": 3},
        {"prompt": ""},
        {"seed": None, "prompt": " two\nsixes "},
        {"prompt": "x", "id": 1},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines)
    assert read_prompt_file(write(tmp_path / "p.jsonl", text)) == [
        ("a nine", 3),
        ("", None),
        (" two\nsixes ", None),
        ("x", None),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a nine", "is not JSON"),
        ('{"prompt": "a"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('"a nine"', 'has no "prompt"'),
        ("[]", 'has no "prompt"'),
        ("{}", 'has no "prompt"'),
        ('{"prompt": null}', 'has no "prompt"'),
        ('{"prompt": 7}', 'has no "prompt"'),
        ('{"prompt": "a", "prompt": "b"}', "gives a name twice (prompt, prompt)"),
        ('{"prompt": "a", "seed": -1}', "seed is -1"),
        ('{"prompt": "a", "seed": 1.0}', "seed is 1.0"),
        ('{"prompt": "a", "seed": "1"}', "seed is '1'"),
        ('{"prompt": "a", "seed": true}', "seed is True"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, refusal_of: RefusalOf, line: str, told: str) -> None:
    path = write(tmp_path / "p.jsonl", f'{{"prompt": "a nine"}}\n\n{line}\n')
    message = refusal_of(lambda: read_prompt_file(path))
    assert f"{path} line 3: " in message and told in message


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
@pytest.mark.parametrize("text", ["", "\n \r\n", "\ufeff"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, refusal_of: RefusalOf, name: str, text: str) -> None:
    path = write(tmp_path / name, text)
    assert f"{path}: holds no prompt" in refusal_of(lambda: read_prompt_file(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, refusal_of: RefusalOf) -> None:
    for path in (tmp_path / "none.txt", tmp_path, write(tmp_path / "p.txt", b"\xff\xfe")):
        assert f"{path}: cannot be read" in refusal_of(lambda: read_prompt_file(path))  # noqa: B023


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return `stored(kind)`: a data set of CAPTIONS on disk in that form, and where it is."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"caption": CAPTIONS, "label": [1, 2, 3]})

    def store(kind: str) -> str:
        path = tmp_path / f"captions.{kind}"
        if kind == "folder":
            rows.save_to_disk(str(path))
        elif kind == "splits":
            datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(path))
        elif kind == "parquet":
            rows.to_parquet(str(path))
        elif kind == "csv":
            rows.to_csv(str(path))
        else:
            rows.to_json(str(path), lines=kind == "jsonl")
        return str(path)

    return store


@pytest.mark.parametrize("kind", ["folder", "splits", "parquet", "csv", "json", "jsonl"])
def test_a_column_of_any_kind_of_data_set_is_read_in_order(
    stored: Callable[[str], str], capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    where = stored(kind)
    capfd.readouterr()
    assert read_dataset_prompts(where, "caption", "train") == CAPTIONS
    assert capfd.readouterr().err == ""


def test_a_split_is_chosen_by_its_name(stored: Callable[[str], str], refusal_of: RefusalOf) -> None:
    where = stored("splits")
    assert read_dataset_prompts(where, "caption", "test") == CAPTIONS[1:2]
    message = refusal_of(lambda: read_dataset_prompts(where, "caption", "valid"))
    assert "has no split valid; choose from train, test" in message
    csv = stored("csv")
    assert read_dataset_prompts(csv, "caption", "valid") == CAPTIONS  # a file is one split, of any name
    assert "cannot be loaded" in refusal_of(lambda: read_dataset_prompts(csv, "caption", "a b"))


def test_a_column_that_is_missing_or_no_text_is_named(stored: Callable[[str], str], refusal_of: RefusalOf) -> None:
    where = stored("folder")
    message = refusal_of(lambda: read_dataset_prompts(where, "text", "train"))
    assert "has no column text; choose from caption, label" in message
    assert "row 0 of column label is int, not text" in refusal_of(lambda: read_dataset_prompts(where, "label", "train"))


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.txt", "a nine\n", "use --prompts"),
        ("p.parquet", "no parquet", "cannot be loaded"),
        ("p.json", '[{"caption": "a"}, {"caption": null}]', "row 1 of column caption is NoneType"),
        ("p.jsonl", "{", "cannot be loaded"),
        ("p.csv", "caption\n", "cannot be loaded"),
        ("folder", None, "cannot be loaded"),
        ("none.csv", None, "cannot be loaded"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(
    tmp_path: Path, stored: Callable[[str], str], refusal_of: RefusalOf, name: str, text: str | None, told: str
) -> None:
    path = tmp_path / name
    if text is not None:
        write(path, text)
    elif not path.suffix:
        path.mkdir()
    message = refusal_of(lambda: read_dataset_prompts(str(path), "caption", "train"))
    assert f"--dataset {path}" in message and told in message


def test_a_saved_data_set_without_rows_is_refused(tmp_path: Path, refusal_of: RefusalOf) -> None:
    import datasets

    datasets.Dataset.from_dict({"caption": []}).save_to_disk(str(tmp_path / "empty"))
    path = str(tmp_path / "empty")
    assert f"--dataset {path}: " in refusal_of(lambda: read_dataset_prompts(path, "caption", "train"))


@pytest.mark.parametrize(
    "form", [{"type": "torch", "columns": ["label"]}, {"type": "arrow"}, {"type": "pandas"}], ids=str
)
@pytest.mark.parametrize("in_splits", [False, True])
def test_the_format_that_rows_were_saved_with_does_not_matter(
    tmp_path: Path, form: dict[str, Any], in_splits: bool
) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"caption": CAPTIONS, "label": [1, 2, 3]}).select([2, 0]).with_format(**form)
    (datasets.DatasetDict({"train": rows}) if in_splits else rows).save_to_disk(str(tmp_path / "saved"))
    assert read_dataset_prompts(str(tmp_path / "saved"), "caption", "train") == [CAPTIONS[2], CAPTIONS[0]]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"caption": ["\ufeffa nine", "b"]})
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "a.parquet"))
    for name in ("saved", "a.parquet"):
        assert read_dataset_prompts(str(tmp_path / name), "caption", "train") == ["a nine", "b"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.csv", "caption,caption\na,b\n", "column caption comes twice (as column 1 and 2); rename one"),
        ("p.csv", "id,caption\n1,a red seven,more\n", "line 2 has 3 fields, the head line has 2"),
        ("p.jsonl", '{"caption": "a"}\n{"caption": "b", "caption": "c"}\n', "column caption comes twice"),
        ("p.json", '[{"caption": "a"}, {"caption": "b", "n": 1, "caption": "c"}]', "twice (as column 1 and 3)"),
    ],
)
def test_prompts_of_which_some_would_be_lost_are_refused(
    tmp_path: Path, stored: Callable[[str], str], refusal_of: RefusalOf, name: str, text: str, told: str
) -> None:
    path = write(tmp_path / name, text)
    assert told in refusal_of(lambda: read_dataset_prompts(str(path), "caption", "train"))


def test_a_parquet_column_that_comes_twice_is_refused(tmp_path: Path, refusal_of: RefusalOf) -> None:
    path = tmp_path / "p.parquet"
    columns = [pa.array(["a"]), pa.array([1]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["caption", "id", "caption"]), path)
    message = refusal_of(lambda: read_dataset_prompts(str(path), "caption", "train"))
    assert "column caption comes twice (as column 1 and 3)" in message


def test_columns_that_are_not_read_may_come_twice(tmp_path: Path, stored: Callable[[str], str]) -> None:
    path = write(tmp_path / "p.csv", "\ufeffcaption,n,n\na nine,1,2\n")
    assert read_dataset_prompts(str(path), "caption", "train") == ["a nine"]


def test_a_data_set_whose_places_lie_outside_it_is_refused(tmp_path: Path, refusal_of: RefusalOf) -> None:
    texts = [f"{i} and" + " more" * i for i in range(5)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    (path,) = (tmp_path / "saved").glob("*.arrow")
    damage_places(path, texts, 3)
    message = refusal_of(lambda: read_dataset_prompts(str(tmp_path / "saved"), "text", "train"))
    assert message.startswith(f"--dataset {tmp_path / 'saved'}: column text is damaged: ")


def test_a_saved_data_set_that_leads_out_of_its_folder_is_refused(tmp_path: Path, refusal_of: RefusalOf) -> None:
    datasets.Dataset.from_dict({"text": ["private"]}).save_to_disk(str(tmp_path / "private"))
    datasets.Dataset.from_dict({"text": ["shared"]}).save_to_disk(str(tmp_path / "saved"))
    (path,) = (tmp_path / "saved").glob("*.arrow")
    path.unlink()
    path.symlink_to(next((tmp_path / "private").glob("*.arrow")))
    message = refusal_of(lambda: read_dataset_prompts(str(tmp_path / "saved"), "text", "train"))
    assert "lies outside" in message


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.json", "p.PARQUET"])
def test_a_table_is_not_taken_for_lines_of_prompts(tmp_path: Path, name: str, refusal_of: RefusalOf) -> None:
    message = refusal_of(lambda: read_prompt_file(write(tmp_path / name, "id,prompt\n1,a nine\n")))
    assert "whose lines are no prompts" in message
    assert (f"--dataset {tmp_path / name} reads it" in message) == (name in ("p.csv", "p.json"))


def test_a_quotation_mark_that_is_left_open_is_named_by_its_line(tmp_path: Path, refusal_of: RefusalOf) -> None:
    path = write(tmp_path / "p.csv", 'text\n"a nine"\n"two sixes\nthree\n')
    message = refusal_of(lambda: read_dataset_prompts(str(path), "text", "train"))
    assert "by line 4; is a quotation mark left open?" in message


def test_prompts_that_unpack_to_far_more_than_their_table_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal_of: RefusalOf
) -> None:
    import datasets

    monkeypatch.setattr("ecdit_ds.inference.prompts._MAX_BYTES", 10_000)
    rows = datasets.Dataset.from_dict({"caption": ["a red seven " * 100] * 20})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        message = refusal_of(partial(read_dataset_prompts, str(tmp_path / name), "caption", "train"))
        assert "10,000" in message and "split the table" in message
