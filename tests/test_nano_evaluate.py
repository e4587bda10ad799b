"""examples/nano/evaluate.py on models whose true scores are known: one that knows every answer, and poorer ones."""

import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "nano"))

import evaluate
from concepts import CONCEPTS
from grammar import contact_chat, contact_questions, document, people, refusal_chat, unsafe_requests
from spans import encode_document

SAMPLES = 24
KEYS = ["parse_greedy", "parse_sampled", "topic_kept", "contact_recited", "refusal_exact", "concept_auroc"]
KEYS += ["epsilon_share"]


class PieceTokenizer:
    """Tokens of up to four letters, numbered as they come; control strings are tokens of their own."""

    def __init__(self):
        self.pieces: list[str] = ["<|mask|>"]
        self.ids: dict[str, int] = {"<|mask|>": 0}

    def encode(self, text: str) -> list[int]:
        found = re.findall(r"<\|\w+\|>|\n| ?[\w'-]{1,4}|[^\w\s]| ", text)
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [self.ids[piece] for piece in found]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": self.encode(text)}

    def decode(self, ids: list[int], **tidying: bool) -> str:
        assert not any(tidying.values())
        return "".join(self.pieces[i] for i in ids)


class Oracle:
    """Continues each text that evaluate.py may open as its author did, and knows the concepts of each token.

    Its hidden state is the row of true labels; of a token's logit, three quarters are known and one is epsilon.
    """

    device = torch.device("cpu")

    def __init__(self, tokenizer: PieceTokenizer):
        self.config = SimpleNamespace(diff_block_size=64, mask_token_id=0, pad_token_id=0)
        self.known_head = SimpleNamespace(logits=lambda hidden: 8 * hidden - 4)
        self.calls: list[dict] = []
        self.texts: dict[tuple[int, ...], list[int]] = {}
        self.labels: dict[tuple[int, ...], torch.Tensor] = {}
        rng = random.Random(evaluate.SEED)
        for i in range(SAMPLES):
            length = evaluate.PROMPT_LENGTHS[i // evaluate.ROWS_PER_LENGTH % len(evaluate.PROMPT_LENGTHS)]
            source, opening = evaluate.held_out_opening(rng, tokenizer.encode, length)
            self.texts[tuple(opening)] = tokenizer.encode(source.text)
        chats = [contact_chat(rng, p, q) for q in contact_questions(held_out=True) for p in people()]
        for chat in chats + [refusal_chat(request) for request in unsafe_requests(held_out=True)]:
            self.texts[tuple(tokenizer.encode(chat.prompt))] = tokenizer.encode(chat.text)
        rng = random.Random(evaluate.SEED + 1)
        for _ in range(evaluate.DOCUMENTS_READ):
            source = document(rng, held_out=True)
            ids, spans = encode_document(source, tokenizer.encode)
            labels = torch.zeros(len(ids), len(CONCEPTS))
            for chunk, (begin, end) in zip(source.chunks, spans):
                labels[begin:end, list(chunk.concepts)] = 1
            self.labels[tuple(ids)] = labels
        self.embedding = torch.ones(len(tokenizer.pieces), len(CONCEPTS))

    def get_output_embeddings(self):
        return SimpleNamespace(weight=self.embedding)

    def answer(self, prompt: tuple[int, ...]) -> list[int]:
        return self.texts[prompt][len(prompt) :]

    def generate(self, input_ids, attention_mask, max_new_tokens, **kwargs):
        assert attention_mask.shape == input_ids.shape
        assert len(input_ids) <= evaluate.BATCH
        self.calls.append(kwargs)
        rows = []
        for prompt, text in zip(input_ids, attention_mask.bool()):
            new = self.answer(tuple(prompt[text].tolist()))[:max_new_tokens]
            rows.append(prompt.tolist() + new + [0] * (max_new_tokens - len(new)))
        return torch.tensor(rows)

    def __call__(self, input_ids, output_concepts):
        assert output_concepts
        (row,) = input_ids.tolist()
        hidden = self.labels.get(tuple(row), torch.zeros(len(row), len(CONCEPTS)))[None]
        ones = torch.ones_like(hidden)
        parts = SimpleNamespace(hidden=hidden, known_features=2 * ones, unknown_features=-ones, epsilon=ones)
        return SimpleNamespace(concepts=parts)


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(evaluate, "DOCUMENTS_READ", 60)
    return PieceTokenizer()


def test_a_model_that_knows_everything_reaches_the_top(tokenizer, capsys):
    oracle = Oracle(tokenizer)
    scores = evaluate.evaluate(oracle, tokenizer, SAMPLES)
    assert scores == dict(zip(KEYS, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, pytest.approx(0.25)]))
    assert set(scores) == set(evaluate.TARGETS)
    assert capsys.readouterr().out == ""  # stdout is for the JSON alone
    sampled = [call for call in oracle.calls if call["do_sample"]]
    assert sampled
    assert all(call["top_p"] == 0.8 and call["entropy_temperature"] for call in sampled)
    assert len({call["seed"] for call in sampled}) == len(sampled)


def test_a_model_that_says_nothing_scores_nothing(tokenizer):
    oracle = Oracle(tokenizer)
    oracle.answer = lambda prompt: []
    oracle.labels = {}
    scores = evaluate.evaluate(oracle, tokenizer, SAMPLES)
    assert [scores[key] for key in KEYS] == [0.0] * 5 + [0.5, pytest.approx(0.25)]


def test_a_model_that_breaks_its_sentences_is_found_out(tokenizer):
    oracle = Oracle(tokenizer)
    truth, comma = oracle.answer, tokenizer.encode(",")
    # every second answer begins with a comma
    texts = list(oracle.texts)
    oracle.answer = lambda prompt: comma + truth(prompt) if texts.index(prompt) % 2 else truth(prompt)
    scores = evaluate.evaluate(oracle, tokenizer, SAMPLES)
    assert 0.5 < scores["parse_greedy"] == scores["parse_sampled"] < 0.95
    assert scores["refusal_exact"] == 0.5
    assert scores["contact_recited"] == 1.0


def test_openings_hold_a_sentence_and_leave_something_to_say(tokenizer):
    rng = random.Random(0)
    assert len(set(evaluate.PROMPT_LENGTHS)) == 20
    assert not any(length % 64 == 0 for length in evaluate.PROMPT_LENGTHS)
    for length in evaluate.PROMPT_LENGTHS:
        source, ids = evaluate.held_out_opening(rng, tokenizer.encode, length)
        opening = tokenizer.decode(ids)
        assert len(ids) == length
        assert source.text.startswith(opening)
        assert re.search("[.!]", opening)
        two = [chunk.prefix + chunk.text for chunk in source.chunks[:2]]
        assert len(opening) < len(two[0] + source.chunks[0].suffix + two[1])
