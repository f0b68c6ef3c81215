"""What is told on a terminal or in a log is one line of plain characters, whatever names it quotes."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdit_ds import errors
from ecdit_ds.data.sources.bad_sample import ReplacedSample
from ecdit_ds.errors import EcditError, escape_unprintable, shown
from ecdit_ds.runtime.exit_report import print_quietly
from ecdit_ds.slurm.rank_logs import last_words
from ecdit_ds.training.callbacks import Console
from ecdit_ds.training.metrics import bad_sample_lines

NASTY = "a\x1b[2J\nerror: forged\r\x08\x9b31m\u202egnp.exe\u2028\udcff\x00b"
"""Clears the screen, forges a line, goes back over it, colours it by one byte, turns it round, and is no UTF-8."""


def _kinds(of: type[EcditError] = EcditError) -> Iterator[type[EcditError]]:
    yield of
    for kind in of.__subclasses__():
        yield from _kinds(kind)


@pytest.mark.parametrize("kind", _kinds())
def test_an_error_quotes_names_in_one_plain_line(kind: type[EcditError]) -> None:
    said = str(kind(f"file {NASTY}: é 日本 is kept"))
    assert said.isprintable() and said.endswith(": é 日本 is kept")
    assert "\\x1b[2J\\nerror: forged\\r\\x08\\x9b31m\\u202egnp.exe\\u2028\\udcff\\x00b" in said
    assert str(kind(said)) == said


def test_all_errors_are_of_one_family() -> None:
    ours = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert set(ours) <= set(_kinds())


def test_plain_text_stays_as_it_is() -> None:
    text = "step_500: 日本語, naïve — 50 % | [x] {y} \\n"
    assert escape_unprintable(text) == text
    assert shown(text) == repr(text)


def test_what_a_run_says_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    bad = ReplacedSample(position=3, set="set", key=NASTY, cause="not an image")
    console = Console(0, 10)
    for line in bad_sample_lines([bad], 5):
        console.on_note(line)
    console.close()
    print_quietly(f"rank 0: {NASTY}", sys.stdout)
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


def test_the_last_words_of_ranks_are_plain(tmp_path: Path) -> None:
    (tmp_path / "rank_0.log").write_bytes(b"error: \x1b[2Jcleared\xff\n")
    (line,) = last_words(tmp_path, is_why_wanted=True)
    assert line.isprintable() and "\\x1b[2Jcleared" in line
