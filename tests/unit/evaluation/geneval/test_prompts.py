"""GenEval's prompts: as many and in such words as published, and files of them that are read or refused by line."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ecdit_ds.evaluation.geneval.prompts import (
    COCO_CLASSES,
    NUM_PROMPTS,
    as_metadata,
    canonical_class,
    draw_prompts,
    read_prompts,
)
from ecdit_ds.evaluation.geneval.rules import COLOURS, RELATIONS, TASKS, GenevalPrompt, Requirement

Refusal = Callable[[Callable[[], object]], str]
BENCH = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}'


@pytest.fixture(scope="module")
def drawn() -> list[GenevalPrompt]:
    """Return the 553 prompts of a seed."""
    return draw_prompts(seed=0)


def of_task(prompts: list[GenevalPrompt], tag: str) -> list[GenevalPrompt]:
    """Return the prompts of a task."""
    return [prompt for prompt in prompts if prompt.tag == tag]


def test_there_are_as_many_distinct_prompts_of_each_task_as_published(drawn: list[GenevalPrompt]) -> None:
    assert Counter(prompt.tag for prompt in drawn) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert len(set(drawn)) == sum(NUM_PROMPTS.values()) == 553
    assert {prompt.include[0].class_name for prompt in of_task(drawn, "single_object")} == set(COCO_CLASSES)


def test_a_seed_gives_one_list_and_another_seed_another(drawn: list[GenevalPrompt]) -> None:
    assert draw_prompts(seed=0) == drawn
    assert len(set(draw_prompts(seed=1)) & set(drawn)) < 250


def test_a_task_does_not_depend_on_how_many_prompts_the_others_have(drawn: list[GenevalPrompt]) -> None:
    assert draw_prompts(seed=0, numbers={"colors": 10}) == of_task(drawn, "colors")[:10]


def test_the_words_say_what_is_required(drawn: list[GenevalPrompt]) -> None:
    def named(words: str) -> str:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    for prompt in drawn:
        first, last = prompt.include[0], prompt.include[-1]
        names = [wanted.class_name for wanted in prompt.include]
        assert len(set(names)) == len(names)
        if prompt.tag == "counting":
            ending = "es" if first.class_name.endswith("s") else "s"
            number = {2: "two", 3: "three", 4: "four"}[first.count]
            words = f"{number} {first.class_name}{ending}"
            assert prompt.exclude == (Requirement(class_name=first.class_name, count=first.count + 1),)
        else:
            assert not prompt.exclude
            assert {wanted.count for wanted in prompt.include} == {1}
            words = " and ".join(named(" ".join(filter(None, (w.colour, w.class_name)))) for w in prompt.include)
        if prompt.tag == "position":
            assert last.position is not None
            assert (first.position, last.position[1]) == (None, 0)
            words = f"{named(last.class_name)} {last.position[0]} {named(first.class_name)}"
        assert prompt.prompt == f"a photo of {words}"
        colours = [wanted.colour for wanted in prompt.include]
        assert (None not in colours) == (prompt.tag in ("colors", "color_attr"))
        assert "person" not in names or colours[0] is None
        assert len(set(colours)) == (1 if None in colours else len(colours))


def test_persons_have_no_colour() -> None:
    few = draw_prompts(["person", "cat", "dog"], seed=0, numbers={"colors": 20, "color_attr": 100, "counting": 9})
    assert {wanted.class_name for prompt in few if prompt.tag != "counting" for wanted in prompt.include} == {
        "cat",
        "dog",
    }
    assert "person" in {prompt.include[0].class_name for prompt in of_task(few, "counting")}


def test_draws_leave_nothing_out(drawn: list[GenevalPrompt]) -> None:
    assert {wanted.colour for p in of_task(drawn, "colors") for wanted in p.include} == set(COLOURS)
    assert {p.include[1].position[0] for p in of_task(drawn, "position") if p.include[1].position} == set(RELATIONS)
    assert {p.include[0].count for p in of_task(drawn, "counting")} == {2, 3, 4}


def test_more_prompts_than_there_can_be_are_refused(refusal_of: Refusal) -> None:
    assert len(draw_prompts(["cat", "dog", "cow"], seed=0, numbers={"counting": 9})) == 9
    message = refusal_of(lambda: draw_prompts(["cat", "dog", "cow"], seed=0, numbers={"counting": 10}))
    assert "10 distinct prompts of counting" in message
    assert "3 classes" in message


def test_prompts_come_back_from_their_file(drawn: list[GenevalPrompt], tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(f"{as_metadata(prompt)}\n" for prompt in drawn), encoding="utf-8")
    assert read_prompts(path) == drawn


def test_a_line_of_the_published_file_is_read_and_written_as_it_is(tmp_path: Path) -> None:
    line = (
        '{"tag": "position", "include": [{"class": "tv", "count": 1}, {"class": "dog", "count": 1, "position": '
        '["right of", 0]}], "prompt": "a photo of a dog right of a tv"}'
    )
    path = tmp_path / "metadata.jsonl"
    path.write_text(f"{BENCH}\n\n{line}\n", encoding="utf-8")
    bench, dog = read_prompts(path)
    assert bench == GenevalPrompt(
        tag="single_object", include=(Requirement(class_name="bench", count=1),), prompt="a photo of a bench"
    )
    assert dog.include[1] == Requirement(class_name="dog", count=1, position=("right of", 0))
    assert (as_metadata(bench), as_metadata(dog)) == (BENCH, line)


def test_classes_have_one_name_whatever_they_are_called(tmp_path: Path) -> None:
    assert len(set(COCO_CLASSES)) == 80
    assert {name: canonical_class(name) for name in ("mouse", "sofa", "computer mouse", "seven")} == {
        "mouse": "computer mouse",
        "sofa": "couch",
        "computer mouse": "computer mouse",
        "seven": "seven",
    }
    path = tmp_path / "metadata.jsonl"
    path.write_text(BENCH.replace("bench", "keyboard"), encoding="utf-8")
    assert read_prompts(path)[0].include[0].class_name == "computer keyboard"


def line_with(**changes: object) -> str:
    """Return the bench's line with some keys changed, or gone where they are None."""
    return json.dumps({key: value for key, value in {**json.loads(BENCH), **changes}.items() if value is not None})


def bench_with(**changes: object) -> str:
    """Return the bench's line with some keys of its requirement changed."""
    wanted = {"class": "bench", "count": 1, **changes}
    return line_with(include=[{key: value for key, value in wanted.items() if value is not None}])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (bench_with(**{"class": "dragonfruit"}), "class 'dragonfruit' is not one of the detector's 80 classes"),
        (bench_with(**{"class": None}), "key 'class' is missing in {'count': 1}"),
        (bench_with(**{"class": 3}), "class must be a name, not 3"),
        (bench_with(count=None), "key 'count' is missing"),
        (bench_with(count=0), "count of 'bench' must be a whole number from 1, not 0"),
        (bench_with(count=True), "count of 'bench' must be a whole number from 1, not True"),
        (bench_with(color="mauve"), "color 'mauve' is not one of red, orange"),
        (bench_with(color=["red"]), "color ['red'] is not one of red, orange"),
        (bench_with(colour="red"), "key 'colour' is none of class, count, color, position"),
        (bench_with(position="left of"), "position must be as"),
        (bench_with(position=["under", 0]), "position 'under' is not one of left of"),
        (bench_with(position=["above", 0]), "must name an earlier entry of include"),
        (bench_with(position=["above", -1]), "must name an earlier entry of include"),
        (line_with(tag="texture"), f"tag 'texture' is not one of {', '.join(TASKS)}"),
        (line_with(tag=None), "key 'tag' is missing"),
        (line_with(prompt=None), "key 'prompt' is missing"),
        (line_with(prompt=7), "prompt must be a str, not 7"),
        (line_with(include=None), "key 'include' is missing"),
        (line_with(include=[]), "include is empty"),
        (line_with(include=["bench"]), "must be an object, not 'bench'"),
        (line_with(exclude=7), "exclude must be a list, not 7"),
        (line_with(exclude=[{"class": "axolotl", "count": 1}]), "class 'axolotl'"),
        ("[1]", "a JSON object is expected, not list"),
        ('{"tag": ', "not JSON"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(line: str, reason: str, tmp_path: Path, refusal_of: Refusal) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(f"{BENCH}\n\n{line}\n{BENCH}\n", encoding="utf-8")
    message = refusal_of(lambda: read_prompts(path))
    assert message.startswith(f"{path} line 3: ")
    assert reason in message


def test_a_file_without_prompts_is_refused(tmp_path: Path, refusal_of: Refusal) -> None:
    path = tmp_path / "metadata.jsonl"
    assert str(path) in refusal_of(lambda: read_prompts(path))
    path.write_text("\n\n", encoding="utf-8")
    assert "holds no prompts" in refusal_of(lambda: read_prompts(path))


def test_the_detector_decides_which_classes_there_are(tmp_path: Path, refusal_of: Refusal) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(BENCH, encoding="utf-8")
    assert len(read_prompts(path, ["bench", "seven"])) == 1
    assert "the detector's 1 classes" in refusal_of(lambda: read_prompts(path, ["seven"]))
