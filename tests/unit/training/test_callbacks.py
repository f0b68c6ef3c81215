"""What a run tells: files that parse, event files that hold the series, lines on a console."""

import errno
import io
import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from ecdit_ds.training.callbacks import BadSampleLines, Callback, Console, JsonLines, TensorBoard


def record(step: int, **changes: Any) -> dict[str, Any]:
    """Return what one step is reported as."""
    facts = {"step": step, "is_skipped": False, "loss": 1.0 / step, "grad_norm": 0.5, "images_per_second": 64.0}
    routing = {"experts_per_token": 2.0, "router_entropy": [0.25, 0.75]}
    return facts | routing | {"model_flops_utilization": None} | changes


def evaluation(step: int, **changes: Any) -> dict[str, Any]:
    """Return what one held-out evaluation is reported as."""
    return {"step": step, "heldout_loss": 0.5, "heldout_loss_ema": 0.25, "heldout_loss_by_time": [0.5] * 8} | changes


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def events(folder: Path) -> EventAccumulator:
    """Return what TensorBoard reads from a folder."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_metrics_have_one_line_a_step_and_evaluations_one_each(tmp_path: Path) -> None:
    metrics, evaluations = tmp_path / "metrics.jsonl", tmp_path / "evaluations.jsonl"
    lines = JsonLines(metrics, evaluations)
    lines.on_report([record(1), record(2, loss=None)])
    lines.on_evaluation(evaluation(2))
    lines.on_report([record(3)])
    lines.close()
    assert lines_of(metrics) == [record(1), record(2, loss=None), record(3)]
    assert lines_of(evaluations) == [evaluation(2)]


def test_a_later_life_appends_to_the_lines(tmp_path: Path) -> None:
    metrics, evaluations = tmp_path / "metrics.jsonl", tmp_path / "evaluations.jsonl"
    for step in (1, 2):
        JsonLines(metrics, evaluations).on_report([record(step)])
    assert [line["step"] for line in lines_of(metrics)] == [1, 2]


def test_tensorboard_has_every_number_as_a_series_and_every_sparse_layer_as_its_own(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, first_step=0)
    board.on_report([record(1), record(2, is_skipped=True), record(3)])
    board.on_evaluation(evaluation(3))
    board.close()
    found = events(tmp_path)
    series = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert set(series) == {
        "train/loss",
        "train/grad_norm",
        "train/images_per_second",
        "train/experts_per_token",
        "train/skipped_steps",
        "routing/router_entropy/moe_layer_0",
        "routing/router_entropy/moe_layer_1",
        "heldout/heldout_loss",
        "heldout/heldout_loss_ema",
    }
    assert series["train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert series["train/skipped_steps"] == [(1, 0.0), (2, 1.0), (3, 1.0)]
    assert series["routing/router_entropy/moe_layer_1"] == [(step, 0.75) for step in (1, 2, 3)]
    assert series["heldout/heldout_loss_ema"] == [(3, 0.25)]


def test_tensorboard_keeps_the_drawn_pictures_and_their_captions(tmp_path: Path) -> None:
    pictures = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    pictures[0, :, :, 0] = 200
    pictures[1, :8, :, 2] = 90
    board = TensorBoard(tmp_path, first_step=0)
    board.on_samples(7, pictures, ["a red seven", "a blue two"])
    board.close()
    found = events(tmp_path)
    shown = [np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in found.Images("samples")]
    assert [image.step for image in found.Images("samples")] == [7]
    for picture in pictures:
        assert any(
            (window == picture).all()
            for window in np.lib.stride_tricks.sliding_window_view(shown[0], picture.shape)[:, :, 0].reshape(
                -1, *picture.shape
            )
        )
    (captions,) = (found.Tensors(tag) for tag in found.Tags()["tensors"] if tag.startswith("captions"))
    assert b"a red seven / a blue two" in captions[0].tensor_proto.string_val[0]


def test_a_life_that_goes_back_hides_the_steps_it_repeats(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, first_step=0)
    first.on_report([record(step, loss=1.0) for step in (1, 2, 3, 4)])
    first.close()
    second = TensorBoard(tmp_path, first_step=2)
    second.on_report([record(step, loss=9.0) for step in (3, 4)])
    second.close()
    losses = [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]


def test_the_console_prints_one_line_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(first_step=0, max_steps=50)
    console.on_report([record(1), record(2)])
    console.on_report([record(3, experts_per_token=None)])
    console.on_note("something happened")
    console.close()
    out, err = capsys.readouterr()
    first, second, note = out.splitlines()
    assert first == "step 2/50 | loss 0.7500 | grad norm 0.500 | 64 images/s | 2 experts/token"
    assert second == "step 3/50 | loss 0.3333 | grad norm 0.500 | 64 images/s"
    assert note == "something happened"
    assert err == ""


def test_the_console_names_both_held_out_losses(capsys: pytest.CaptureFixture[str]) -> None:
    Console(first_step=0, max_steps=50).on_evaluation(evaluation(10))
    (line,) = capsys.readouterr().out.splitlines()
    assert "step 10" in line
    assert "0.5000" in line
    assert "0.2500" in line


@pytest.mark.parametrize("kind", ["console", "lines", "board"])
def test_numbers_that_were_not_finite_end_no_run(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks: dict[str, Callback] = {
        "console": Console(first_step=0, max_steps=50),
        "lines": JsonLines(tmp_path / "metrics.jsonl", tmp_path / "evaluations.jsonl"),
        "board": TensorBoard(tmp_path / "board", first_step=0),
    }
    callback = callbacks[kind]
    bad = record(1, loss=None, grad_norm=None, router_entropy=[None, 0.75], is_skipped=True)
    callback.on_report([bad])
    callback.on_evaluation(evaluation(1, heldout_loss=None, heldout_loss_ema=None, heldout_loss_by_time=[None] * 8))
    callback.on_report([record(2)])
    for each in callbacks.values():
        each.close()
    told = {
        "console": len(capsys.readouterr().out.splitlines()) == 3,
        "lines": (tmp_path / "metrics.jsonl").exists() and lines_of(tmp_path / "metrics.jsonl") == [bad, record(2)],
        "board": "train/loss" in events(tmp_path / "board").Tags()["scalars"],
    }
    assert told[kind]


def test_a_later_life_counts_on_from_the_steps_that_were_skipped_before(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, first_step=6, num_skipped=2)
    board.on_report([record(7), record(8, is_skipped=True), record(9)])
    board.close()
    assert [event.value for event in events(tmp_path).Scalars("train/skipped_steps")] == [2.0, 3.0, 3.0]


def test_the_bar_of_a_terminal_stands_at_the_last_step_also_in_a_later_life(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    console = Console(first_step=4, max_steps=20)
    assert " 4/20 " in terminal.getvalue()
    console.on_report([record(5), record(7)])  # whoever writes reports may leave steps out
    console.on_report([record(12, loss=None)])
    console.close()
    assert " 12/20 " in terminal.getvalue().split("\r")[-1]
    assert "loss nan" in terminal.getvalue()


SCENES = {
    "model": {"overall": 0.5, "kinds": {"count": {"share": 0.25}, "colour": {"share": 0.75}}},
    "reference": {"overall": 0.875, "kinds": {"count": {"share": 1.0}, "colour": {"share": 0.75}}},
}


def test_scenes_drawn_right_are_told_in_per_cent_of_the_model_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    Console(0, 9).on_evaluation(evaluation(3, scenes=SCENES))
    assert capsys.readouterr().out.splitlines()[-1] == "step 3 | scenes drawn right 50.0 % (count 25, colour 75)"


def test_scenes_drawn_right_are_a_series_a_kind_and_their_mean_of_model_and_reference(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, first_step=0)
    board.on_evaluation(evaluation(3, scenes=SCENES))
    board.close()
    found = events(tmp_path)
    series = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert {tag: values for tag, values in series.items() if tag.startswith("scenes")} == {
        "scenes_model/mean": [(3, 0.5)],
        "scenes_model/count": [(3, 0.25)],
        "scenes_model/colour": [(3, 0.75)],
        "scenes_reference/mean": [(3, 0.875)],
        "scenes_reference/count": [(3, 1.0)],
        "scenes_reference/colour": [(3, 0.75)],
    }


def test_lines_that_a_full_disk_cut_off_are_taken_back_and_written_whole_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [10**6]

    def open_on_a_disk(path: Path, *mode: Any, **options: Any) -> Any:
        """Open a file that takes seven bytes at a time, as long as there is room."""
        file = open(path, *mode, **options)  # noqa: SIM115 -- closed by whoever asked
        take = file.write

        def write(data: bytes) -> int:
            if room[0] <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            room[0] -= 7
            return take(data[:7])

        return SimpleNamespace(write=write, tell=file.tell, truncate=file.truncate, close=file.close)

    monkeypatch.setattr(
        "ecdit_ds.training.callbacks.open", lambda *a, **k: closing(open_on_a_disk(*a, **k)), raising=False
    )
    path = tmp_path / "bad_samples.jsonl"
    lines = BadSampleLines(path)
    lines.on_bad_samples([{"step": 1, "key": "a"}, {"step": 1, "key": "b"}])
    whole = path.read_bytes()
    room[0] = 20
    with pytest.raises(OSError, match="No space"):
        lines.on_bad_samples([{"step": 2, "key": "c"}])
    assert path.read_bytes() == whole
    room[0] = 10**6
    lines.on_bad_samples([{"step": 3, "key": "d"}])
    lines.on_bad_samples([{"step": 4, "key": "e"}])
    assert [(line["step"], line["key"]) for line in lines_of(path)] == [
        (1, "a"),
        (1, "b"),
        (2, "c"),
        (3, "d"),
        (4, "e"),
    ]
