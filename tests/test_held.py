"""The most bytes held at once: what is made, what is given back, and what only looks at another's storage."""

import torch

from formery.evidence.held import most_held


def test_the_peak_is_what_is_alive_at_once() -> None:
    known = torch.zeros(100)

    def run() -> None:
        first = known + 1
        seen = first[:10].view(2, 5)
        del first  # `seen` keeps its storage
        second = known + 1
        del seen
        known + second

    assert most_held(run, [known]) == 3 * 100 * 4


def test_what_is_known_counts_once_however_often_it_is_named() -> None:
    known = torch.zeros(100)
    assert most_held(lambda: known.view(10, 10), [known, known[:5]]) == 400
    assert most_held(lambda: None, []) == 0
