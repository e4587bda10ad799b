"""Cutting texts into chunks, and what concepts made of each, against sums by hand."""

from types import SimpleNamespace

import pytest
import torch
from steerling_hf.modeling.attribution_steerling import SteerlingAttributions

from steerling_hf.chunks import aggregate, split

CHUNK, TURN, EOS, OTHER_EOS = 90, 91, 92, 93
CONFIG = SimpleNamespace(endofchunk_token_id=CHUNK, eot_id=TURN, eos_token_ids=(EOS, OTHER_EOS), pad_token_id=None)


def cut(pieces, **kwargs):
    """Spans of a text that is given as what its tokens write; numbers stand for control tokens."""
    tokens = [piece if isinstance(piece, int) else number for number, piece in enumerate(pieces)]
    return split(tokens, ["" if isinstance(piece, int) else piece for piece in pieces], CONFIG, **kwargs)


def test_chunks_end_where_the_model_says_and_the_text_with_the_turn():
    assert cut(["p", "a", "b", CHUNK, CHUNK, "c", CHUNK, TURN, "d"], start=1) == [(1, 3), (5, 6)]


def test_an_open_last_chunk_counts_and_an_empty_one_does_not():
    assert cut(["a", CHUNK, "b", "c"]) == [(0, 1), (2, 4)]
    assert cut(["a", CHUNK]) == [(0, 1)]
    assert cut([TURN, "a"]) == []
    assert cut(["a", EOS, "b"]) == cut(["a", OTHER_EOS, "b"]) == [(0, 1)]


def test_sentences_end_with_their_marks_and_with_chunks():
    pieces = ["It", " rains", '."', " Why", "?", " So", CHUNK, "No", " end"]
    assert cut(pieces, by="sentence") == [(0, 3), (3, 5), (5, 6), (7, 9)]


def test_spans_are_taken_as_they_are_and_checked():
    assert cut(["a", "b", "c"], by=[(0, 1), (1, 3)]) == [(0, 1), (1, 3)]
    for spans in ([(0, 4)], [(2, 2)], [(-1, 1)], [(0, 2), (1, 3)], [(1, 3), (0, 1)]):
        with pytest.raises(ValueError, match=r"`by` has the span .*from position 0 on.*to 3"):
            cut(["a", "b", "c"], by=spans)
    with pytest.raises(ValueError, match=r"`by` has the span \(0, 2\).*from position 1 on.*to 3"):
        cut(["a", "b", "c"], by=[(0, 2)], start=1)
    with pytest.raises(ValueError, match=r"`by` is 'word'.*'sentence'"):
        cut(["a"], by="word")


ATTRIBUTIONS = SteerlingAttributions(
    logits=torch.tensor([[9.0, 4.0, 2.0]]),
    known_indices=torch.tensor([[[0, 1], [1, 2], [5, 5]]]),
    known_weights=torch.ones(1, 3, 2),
    known_contributions=torch.tensor([[[9.0, 9.0], [3.0, -1.0], [0.5, 0.5]]]),
    unknown_indices=torch.tensor([[[0], [0], [3]]]),
    unknown_weights=torch.ones(1, 3, 1),
    unknown_contributions=torch.tensor([[[9.0], [2.0], [-1.0]]]),
    residual=torch.tensor([[9.0, 0.0, 2.0]]),
)


def test_plain_sums_add_up_to_the_logits():
    found = aggregate(ATTRIBUTIONS, 0, 1, 3, n_known=10, normalize=False)
    assert dict(zip(found.ids.tolist(), found.contributions.tolist())) == {1: 3, 2: -1, 5: 1, 10: 2, 13: -1}
    assert found.ids[0] == 1  # the strongest first
    assert (found.known, found.unknown, found.residual) == (3, 1, 2)
    assert found.known + found.unknown + found.residual == ATTRIBUTIONS.logits[0, 1:].sum()


def test_each_token_has_one_vote_in_normalised_ones():
    found = aggregate(ATTRIBUTIONS, 0, 1, 3, n_known=10)
    # Absolute mass of the tokens: 3 + 1 + 2 + 0 and 0.5 + 0.5 + 1 + 2.
    wanted = {1: 3 / 6 / 2, 2: -1 / 6 / 2, 5: 1 / 4 / 2, 10: 2 / 6 / 2, 13: -1 / 4 / 2}
    assert dict(zip(found.ids.tolist(), found.contributions.tolist())) == pytest.approx(wanted)
    assert found.residual == pytest.approx(2 / 4 / 2)


def test_no_discovered_head():
    alone = SteerlingAttributions(
        **{key: value for key, value in ATTRIBUTIONS.items() if not key.startswith("unknown")}
    )
    found = aggregate(alone, 0, 0, 3, n_known=10)
    assert found.unknown == 0
    assert max(found.ids) < 10
