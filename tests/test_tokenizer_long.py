"""Long runs of one kind of character: tiktoken's ids, where tiktoken alone panics or would take quadratic time."""

import random

import pytest
from steerling_hf.tokenization import vocabulary_steerling
from tokenizer_oracle import oracle

from steerling_hf import SteerlingTokenizer, checkpoint

NAME = "steerling-nano"
MILLION = 1_100_000
SPACES = [" ", "\t", "\n", "\r", "\u3000", "\x85"]


@pytest.fixture(scope="module")
def tokenizer() -> SteerlingTokenizer:
    return SteerlingTokenizer.from_pretrained(checkpoint(NAME))


@pytest.mark.parametrize(
    ("before", "character", "behind"), [("!", "\n", "x"), ("a", " ", "<|mask|>b"), ("", "中", "")]
)
def test_a_million_of_one_character(tokenizer, before, character, behind):
    text = before + character * MILLION + behind
    encoding = tokenizer(text, verbose=False)
    assert tokenizer.decode(encoding["input_ids"]) == text
    batch = tokenizer([text, "a"], verbose=False)
    assert batch["input_ids"] == [encoding["input_ids"], tokenizer("a").input_ids]


def test_cuts_change_no_id(tokenizer, monkeypatch):
    """With runs cut from two characters on, random whitespace among everything else has the ids of tiktoken itself."""
    monkeypatch.setattr(vocabulary_steerling, "LONG_WHITESPACE", 2)
    pattern = vocabulary_steerling._LONG_RUN.pattern.replace("{100000,}", "{2,}")
    monkeypatch.setattr(vocabulary_steerling, "_LONG_RUN", vocabulary_steerling.re.compile(pattern))
    rng, cut = random.Random(3), 0
    for _ in range(3000):
        text = "".join(
            rng.choice([*SPACES, *SPACES, "a", "B", "1", "!", "'s", "\x1c", "日"]) for _ in range(rng.randrange(12))
        )
        cut += len(list(vocabulary_steerling._pieces(text))) > 1
        assert tokenizer(text).input_ids == oracle(NAME).encode_ordinary(text), repr(text)
    assert cut > 1000


def test_thousands_of_added_tokens(tokenizer):
    """Added one by one, and looked for in a text that all of them nearly match."""
    own = SteerlingTokenizer.from_pretrained(checkpoint(NAME))
    names = [f"<|tool_{number}|>" for number in range(3000)] + ["<|tool", "<|tool_1", "a" * 300, "a" * 299]
    own.add_tokens(names)
    for name in names[:50]:
        own.add_tokens([name + "!"])
    text = "<|tool_" * 20_000 + "<|tool_17|>x<|tool_1y" + "a" * 300 + "b" + "a" * 299
    ids = own(text, verbose=False).input_ids
    found = [own.convert_ids_to_tokens(id_) for id_ in ids if id_ >= len(tokenizer)]
    assert found == ["<|tool"] * 20_000 + ["<|tool_17|>", "<|tool_1", "a" * 300, "a" * 299]


def test_runs_of_added_tokens_that_nest():
    own = SteerlingTokenizer.from_pretrained(checkpoint(NAME))
    own.add_tokens(["<" * length for length in range(1, 400)])
    assert [len(own.convert_ids_to_tokens(id_)) for id_ in own("<" * 500).input_ids] == [399, 101]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (5, "`text` is of the type int"),
        (b"a", "`text` is of the type bytes"),
        (["a", None], "`text` has items of the types NoneType, str"),
        ([["a", 5]], "`text` has items of the types int, str"),
        ([1, -1], "`text` has ids from -1 to 1; the vocabulary has 0 to 8199"),
        ([[10**9]], "`text` has ids from 1000000000"),
        ([True], "`text` has items of the types bool"),
    ],
)
def test_what_is_no_text(tokenizer, text, words):
    with pytest.raises(ValueError, match=words):
        tokenizer(text)


def test_other_arguments_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`text` is of the type int"):
        tokenizer.tokenize(5)
    with pytest.raises(ValueError, match="`max_length` is -1"):
        tokenizer("a", truncation=True, max_length=-1)
    with pytest.raises(ValueError, match="`max_length` is 0"):
        tokenizer("a", truncation=True, max_length=0)
    with pytest.raises(TypeError, match=r"`token_ids` is \[1.5\]"):
        tokenizer.decode([1.5])
    with pytest.raises(ValueError, match="`tokens` has 5"):
        tokenizer.convert_tokens_to_string([5])
    with pytest.raises(ValueError, match="`new_tokens` has .*lone surrogate"):
        tokenizer.add_tokens("a\ud800")
    with pytest.raises(ValueError, match="`special_tokens_dict` is of the type str"):
        tokenizer.add_special_tokens("a")
    with pytest.raises(ValueError, match="`filename_prefix` is '../x'"):
        tokenizer.save_vocabulary(tmp_path, "../x")
