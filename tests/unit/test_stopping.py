"""Being asked to stop: who asked, in words that stay short at any size."""

import pytest

from ecdit_ds.stopping import reasons_of


@pytest.mark.parametrize(
    ("reason_by_rank", "words"),
    [
        (["SIGTERM"], "SIGTERM on rank 0"),
        ([None, "SIGTERM", None], "SIGTERM on rank 1"),
        (["SIGUSR1"] * 512, "SIGUSR1 on all ranks"),
        ([None, "SIGUSR1", "SIGUSR1"], "SIGUSR1 on ranks 1, 2"),
        ([None] * 500 + ["SIGUSR1"] * 12, "SIGUSR1 on 12 of 512 ranks, rank 500 first"),
        (["the launcher died", "SIGTERM"], "the launcher died on rank 0; SIGTERM on rank 1"),
    ],
)
def test_whoever_was_asked_to_stop_is_named_in_few_words(reason_by_rank: list[str | None], words: str) -> None:
    assert reasons_of(reason_by_rank) == words
