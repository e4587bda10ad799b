"""SteerlingTokenizer and raw tiktoken give the same ids and texts, and every id has a string that keeps its bytes."""

import random

import pytest
from tokenizer_oracle import SPECIALS, bytes_of_token_string, oracle, random_surrogates, random_text

from steerling_hf import SteerlingTokenizer, checkpoint

NAMES = list(SPECIALS)
SIZES = {"steerling-8b": 100281, "steerling-8b-instruct": 100284, "steerling-nano": 8200}


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name) -> SteerlingTokenizer:
    return SteerlingTokenizer.from_pretrained(checkpoint(name))


@pytest.fixture(scope="module")
def raw(name):
    return oracle(name)


@pytest.fixture(scope="module")
def texts(name) -> list[str]:
    rng = random.Random(0)
    return [random_text(rng, list(SPECIALS[name])) for _ in range(12_000)]


# ---- Ids


def test_ids_equal_tiktoken(tokenizer, raw, texts):
    expected = [raw.encode(text, allowed_special="all") for text in texts]
    assert tokenizer(texts)["input_ids"] == expected
    assert [tokenizer(text)["input_ids"] for text in texts[:2000]] == expected[:2000]
    assert [tokenizer.encode(text) for text in texts[:500]] == expected[:500]


def test_ids_of_special_strings_as_plain_text_equal_tiktoken(tokenizer, raw, texts):
    expected = [raw.encode_ordinary(text) for text in texts]
    assert tokenizer(texts, split_special_tokens=True)["input_ids"] == expected
    assert [tokenizer.encode(text, split_special_tokens=True) for text in texts[:500]] == expected[:500]


def test_ids_by_way_of_token_strings_are_the_same(tokenizer, texts):
    direct = tokenizer(texts[:2000])["input_ids"]
    assert [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts[:2000]] == direct


def test_a_batch_in_threads_equals_tiktoken(tokenizer, raw):
    rng = random.Random(1)
    plain = [" ".join(random_text(rng, ["x"]) for _ in range(200)).replace("<|", "<") for _ in range(40)]
    assert sum(map(len, plain)) > 50_000
    assert tokenizer(plain, verbose=False)["input_ids"] == raw.encode_ordinary_batch(plain)
    plain[7] += "<|mask|>"
    assert tokenizer(plain, verbose=False)["input_ids"][7][-1] == tokenizer.mask_token_id


def test_surrogates_as_in_tiktoken(tokenizer, raw):
    rng = random.Random(2)
    texts = [random_surrogates(rng) for _ in range(1000)]
    assert tokenizer(texts)["input_ids"] == [raw.encode_ordinary(text) for text in texts]
    assert tokenizer.decode(tokenizer("a\ud800b").input_ids) == "a\ufffdb"
    assert tokenizer("\ud83d\ude00").input_ids == tokenizer("😀").input_ids


def test_long_runs_of_one_character(tokenizer, raw):
    for text in (" " * 5000, "\n" * 5000, "a" * 5000, "7" * 5000, "é" * 5000):
        assert tokenizer.encode(text, verbose=False) == raw.encode_ordinary(text)


def test_the_longest_special_string_wins_and_neighbours_are_apart():
    tokenizer = SteerlingTokenizer(num_ranks=300)
    tokenizer.add_tokens(["ab", "abc", "bcd"])
    assert tokenizer.tokenize("abcd<|pad|><|pad|>ab") == ["abc", "d", "<|pad|>", "<|pad|>", "ab"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcd<|pad|><|pad|>ab").input_ids) == tokenizer.tokenize(
        "abcd<|pad|><|pad|>ab"
    )


def test_nothing_is_put_around_a_text(tokenizer, raw):
    assert tokenizer("Hello").input_ids == raw.encode_ordinary("Hello")
    assert tokenizer("Hello", "there").input_ids == raw.encode_ordinary("Hello") + raw.encode_ordinary("there")


def test_an_infill_is_written_with_the_mask_string(tokenizer, raw):
    mask = SPECIALS[raw.name]["<|mask|>"]
    ids = tokenizer("The <|mask|><|mask|> sat").input_ids
    assert ids == [*raw.encode_ordinary("The "), mask, mask, *raw.encode_ordinary(" sat")]


# ---- Texts


def test_decoded_texts_equal_tiktoken(tokenizer, raw, texts):
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert [tokenizer.decode(row) for row in ids[:2000]] == texts[:2000]
    rng = random.Random(3)
    known = [id_ for id_ in range(SIZES[raw.name]) if "<|unused_" not in tokenizer.convert_ids_to_tokens(id_)]
    for _ in range(2000):  # ids at random cut UTF-8 wherever they like
        row = rng.choices(known, k=8)
        assert tokenizer.decode(row) == raw.decode(row)


def test_bytes_that_are_no_utf8_survive_in_token_strings(tokenizer, raw):
    rng = random.Random(4)
    for _ in range(2000):
        data = rng.randbytes(rng.randint(1, 20))
        ids = raw._encode_bytes(data)
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert b"".join(map(bytes_of_token_string, tokens)) == data
        assert tokenizer.convert_tokens_to_ids(tokens) == ids
        assert tokenizer.decode(ids) == tokenizer.convert_tokens_to_string(tokens) == data.decode("utf-8", "replace")


def test_skip_special_tokens(tokenizer, raw):
    text = "a" + "".join(SPECIALS[raw.name]) + "b"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(SPECIALS[raw.name]) + 2
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_spaces_are_left_as_they_are_unless_asked(tokenizer):
    ids = tokenizer("Well , do n't !").input_ids
    assert tokenizer.decode(ids) == "Well , do n't !"
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "Well, don't!"


def test_decode_takes_arrays_tensors_batches_and_single_ids(tokenizer):
    batch = tokenizer(["Hello there", "Hello"], padding=True, return_tensors="pt").input_ids
    assert tokenizer.decode(batch, skip_special_tokens=True) == ["Hello there", "Hello"]
    assert tokenizer.batch_decode(batch.numpy(), skip_special_tokens=True) == ["Hello there", "Hello"]
    assert tokenizer.decode(batch[0]) == tokenizer.decode(batch[0].numpy()) == tokenizer.decode(batch[0].tolist())
    assert (
        tokenizer.decode(batch[0, 0]) == tokenizer.decode(batch[0, 0].item()) == tokenizer.decode(list(batch[0, :1]))
    )
    assert tokenizer.decode([]) == ""


# ---- Vocabulary


def test_every_id(tokenizer, raw):
    size = SIZES[raw.name]
    assert tokenizer.vocab_size == len(tokenizer) == size
    tokens = tokenizer.convert_ids_to_tokens(range(size))
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(size))
    assert [tokenizer.convert_ids_to_tokens(id_) for id_ in range(size)] == tokens
    assert tokenizer.get_vocab() == {token: id_ for id_, token in enumerate(tokens)}
    assert len(set(tokens)) == size
    special = {id_: token for token, id_ in SPECIALS[raw.name].items()}
    ranks = len(raw._mergeable_ranks)
    for id_, token in enumerate(tokens):
        if id_ < ranks:
            data = raw.decode_single_token_bytes(id_)
            assert bytes_of_token_string(token) == data
            assert tokenizer.decode([id_]) == data.decode("utf-8", "replace")
        else:
            assert token == tokenizer.decode([id_]) == special.get(id_, f"<|unused_{id_}|>")


def test_ids_without_a_token_have_a_name_that_no_text_becomes():
    tokenizer = SteerlingTokenizer()
    unused = [100256, *range(100261, 100276)]
    assert [id_ for token, id_ in tokenizer.get_vocab().items() if token.startswith("<|unused_")] == unused
    for id_ in unused:
        assert id_ not in tokenizer(f"<|unused_{id_}|>").input_ids
        assert tokenizer.decode(tokenizer(f"<|unused_{id_}|>").input_ids) == f"<|unused_{id_}|>"


def test_special_tokens_are_attributes(name, tokenizer):
    by_attribute = {
        "endofchunk_token": "<|endofchunk|>",
        "bos_token": "<|bos|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "mask_token": "<|mask|>",
        "start_header_token": "<|start_header_id|>",
        "end_header_token": "<|end_header_id|>",
        "eot_token": "<|eot_id|>",
        "fim_prefix_token": "<|fim_prefix|>",
        "fim_middle_token": "<|fim_middle|>",
        "fim_suffix_token": "<|fim_suffix|>",
        "endofprompt_token": "<|endofprompt|>",
    }
    specials = SPECIALS[name]
    for attribute, token in by_attribute.items():
        assert getattr(tokenizer, attribute) == (token if token in specials else None)
        assert getattr(tokenizer, attribute + "_id") == specials.get(token)
    assert dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)) == specials
    assert tokenizer.unk_token is None
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") is None


def test_the_arguments_give_the_same_tokenizers_as_the_folders(name, tokenizer):
    arguments = {
        "steerling-8b": {},
        "steerling-8b-instruct": {"instruct": True},
        "steerling-nano": {"instruct": True, "num_ranks": 8192},
    }
    made = SteerlingTokenizer(**arguments[name])
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert made.special_tokens_map == tokenizer.special_tokens_map
    assert made.padding_side == tokenizer.padding_side == "left"


def test_special_token_ids_are_those_of_the_configuration(name, tokenizer):
    from steerling_hf import SteerlingConfig

    config = SteerlingConfig.from_pretrained(checkpoint(name))
    assert len(tokenizer) == config.vocab_size
    for key in ("pad", "bos", "eos", "mask", "endofchunk"):
        assert getattr(tokenizer, f"{key}_token_id") == getattr(config, f"{key}_token_id")
    assert tokenizer.start_header_token_id == config.start_header_id
    assert tokenizer.end_header_token_id == config.end_header_id
    assert tokenizer.eot_token_id == config.eot_id
    assert tokenizer.model_max_length == config.block_size
