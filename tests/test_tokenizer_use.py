"""SteerlingTokenizer as transformers uses it: padding, truncation, tensors, offsets, added tokens, saving, copying."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from tokenizer_oracle import VOCAB_FILE, bytes_of_token_string, oracle
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from steerling_hf import SteerlingTokenizer, checkpoint

TEXT = "The naïve café owner <|mask|> 日本 👩‍🚀 don't\n\n  stop"


@pytest.fixture
def tokenizer() -> SteerlingTokenizer:
    return SteerlingTokenizer.from_pretrained(checkpoint("steerling-nano"))


# ---- Rows of a batch


def test_padding_on_both_sides(tokenizer):
    pad, short, long = tokenizer.pad_token_id, tokenizer("a b").input_ids, tokenizer("a b c d").input_ids
    left = tokenizer(["a b", "a b c d"], padding=True)
    assert left["input_ids"] == [[pad, pad, *short], long]
    assert left["attention_mask"] == [[0, 0, 1, 1], [1, 1, 1, 1]]
    right = tokenizer(["a b", "a b c d"], padding=True, padding_side="right")
    assert right["input_ids"] == [[*short, pad, pad], long]
    assert right["attention_mask"] == [[1, 1, 0, 0], [1, 1, 1, 1]]
    tokenizer.padding_side = "right"
    assert tokenizer(["a b", "a b c d"], padding="longest")["input_ids"] == right["input_ids"]
    to_length = tokenizer("a b", padding="max_length", max_length=6, pad_to_multiple_of=4)
    assert to_length["input_ids"] == [*short, *[pad] * 6]
    assert to_length["attention_mask"] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_truncation_on_both_sides(tokenizer):
    ids = tokenizer(TEXT).input_ids
    assert tokenizer(TEXT, truncation=True, max_length=5).input_ids == ids[:5]
    assert tokenizer([TEXT, "a"], truncation=True, max_length=5)["input_ids"] == [ids[:5], tokenizer("a").input_ids]
    tokenizer.truncation_side = "left"
    assert tokenizer(TEXT, truncation=True, max_length=5).input_ids == ids[-5:]
    long = "word " * 1000
    assert len(tokenizer(long, truncation=True).input_ids) == tokenizer.model_max_length == 512


def test_what_is_too_long_for_the_model_is_warned_about(tokenizer, library_warnings):
    tokenizer("word " * 1000)
    assert "longer than the specified maximum" in library_warnings[0]
    library_warnings.clear()


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_tensors(tokenizer, kind):
    one = tokenizer("a b", return_tensors=kind)
    assert one["input_ids"].tolist() == [tokenizer("a b").input_ids]
    assert one["attention_mask"].tolist() == [[1, 1]]
    two = tokenizer(["a b", "a"], padding=True, return_tensors=kind)
    assert two["input_ids"].shape == two["attention_mask"].shape == (2, 2)
    assert tokenizer.encode("a b", return_tensors=kind).tolist() == [tokenizer("a b").input_ids]


def test_unequal_rows_are_no_tensor(tokenizer):
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer(["a b", "a"], return_tensors="pt")


def test_empty_text_and_empty_batch(tokenizer):
    assert dict(tokenizer("")) == {"input_ids": [], "attention_mask": []}
    assert dict(tokenizer(["", "a"])) == {"input_ids": [[], tokenizer("a").input_ids], "attention_mask": [[], [1]]}
    assert dict(tokenizer([])) == {"input_ids": [], "attention_mask": []}
    assert tokenizer.encode("") == [] == tokenizer.tokenize("")
    assert tokenizer("", padding="max_length", max_length=2)["attention_mask"] == [0, 0]
    empty = tokenizer("", return_tensors="pt")
    assert empty["input_ids"].shape == (1, 0)
    assert empty["input_ids"].dtype == torch.int64


def test_texts_do_not_go_through_token_strings(tokenizer, monkeypatch):
    texts = ["one two", "three <|mask|> é", ""]
    expected = tokenizer(texts, padding=True)

    def refuse(*arguments):
        raise AssertionError("went through token strings")

    for method in ("tokenize", "_tokenize", "_convert_token_to_id", "_convert_id_to_token", "convert_ids_to_tokens"):
        monkeypatch.setattr(SteerlingTokenizer, method, refuse)
    assert tokenizer(texts, padding=True) == expected
    assert [tokenizer(text).input_ids for text in texts] == tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


def test_pairs_words_and_other_outputs_take_the_library_way(tokenizer):
    first, second = tokenizer("one two").input_ids, tokenizer("three").input_ids
    assert tokenizer(["one two", ""], ["three", "three"])["input_ids"] == [first + second, second]
    assert tokenizer([["one two", "three"]])["input_ids"] == [first + second]
    assert tokenizer(["one", " two"], is_split_into_words=True).input_ids == first
    more = tokenizer("one two", return_length=True, return_special_tokens_mask=True, return_token_type_ids=True)
    assert more["length"] == len(first)
    assert more["special_tokens_mask"] == more["token_type_ids"] == [0] * len(first)
    cut = tokenizer("one two", truncation=True, max_length=1, return_overflowing_tokens=True)
    assert cut["input_ids"] + cut["overflowing_tokens"] == first
    assert tokenizer("a", text_target="one two")["labels"] == first
    assert tokenizer.get_special_tokens_mask(tokenizer("a<|mask|>").input_ids, already_has_special_tokens=True) == [
        0,
        1,
    ]


# ---- Offsets


@pytest.mark.parametrize("name", ["steerling-8b", "steerling-nano"])
def test_offsets(name):
    tokenizer = SteerlingTokenizer.from_pretrained(checkpoint(name))
    encoding = tokenizer(TEXT, return_offsets_mapping=True)
    assert encoding["input_ids"] == tokenizer(TEXT).input_ids
    pairs = list(zip(encoding["input_ids"], encoding["offset_mapping"]))
    for id_, (start, end) in pairs:  # a token's bytes lie in its characters, and whole characters are the token
        assert "\ufffd" in tokenizer.decode([id_]) or tokenizer.decode([id_]) == TEXT[start:end]
    _, starts = oracle(name).decode_with_offsets(encoding["input_ids"])
    assert [start for start, _ in encoding["offset_mapping"]] == starts
    assert encoding["offset_mapping"][-1][1] == len(TEXT)


def test_offsets_follow_truncation_and_padding(tokenizer):
    whole = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    row = {"truncation": True, "max_length": 6, "padding": "max_length", "return_offsets_mapping": True}
    assert tokenizer([TEXT, "a b"], **row)["offset_mapping"] == [whole[:6], [(0, 0)] * 4 + [(0, 1), (1, 3)]]
    assert tokenizer("a b", **row, padding_side="right")["offset_mapping"] == [(0, 1), (1, 3)] + [(0, 0)] * 4
    tokenizer.truncation_side = "left"
    assert tokenizer(TEXT, **row)["offset_mapping"] == whole[-6:]
    assert tokenizer(TEXT, **row, return_tensors="pt")["offset_mapping"].shape == (1, 6, 2)


def test_offsets_leave_room_for_tokens_around_a_text():
    tokenizer = SteerlingTokenizer(num_ranks=8192, special_tokens_pattern="bos_eos")
    encoding = tokenizer("a b c", truncation=True, max_length=4, return_offsets_mapping=True)
    assert encoding["input_ids"] == [
        tokenizer.bos_token_id,
        *tokenizer("a b", add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]
    assert encoding["offset_mapping"] == [(0, 0), (0, 1), (1, 3), (0, 0)]


def test_offsets_find_the_token_of_a_character(tokenizer):
    encoding = tokenizer(["a b", TEXT], padding=True, return_offsets_mapping=True)
    index = encoding.char_to_token(1, TEXT.index("<|mask|>") + 3)
    assert encoding["input_ids"][1][index] == tokenizer.mask_token_id
    assert encoding.char_to_token(0, 2) == len(encoding["input_ids"][0]) - 1
    assert encoding.char_to_token(0, 3) is None
    assert tokenizer("a b", return_offsets_mapping=True).char_to_token(2) == 1


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a", {"text_pair": "b"}),
        (["a", "b"], {"is_split_into_words": True}),
        ([1, 2], {}),
        ("a", {"return_overflowing_tokens": True}),
        ("a\ud800", {}),
    ],
)
def test_offsets_are_refused_where_there_are_none(tokenizer, text, options):
    with pytest.raises(ValueError, match="`return_offsets_mapping` is True, "):
        tokenizer(text, return_offsets_mapping=True, **options)


# ---- Added tokens


def test_added_tokens(tokenizer):
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<new>", AddedToken("<other>"), "<new>"]) == 2
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]}) == 1
    assert len(tokenizer) == len(tokenizer.get_vocab()) == size + 3
    assert tokenizer.vocab_size == size
    assert sorted(tokenizer.get_vocab().values()) == list(range(size + 3))
    text = "a<new>b <other><|tool|> é"
    ids = tokenizer(text).input_ids
    assert [id_ for id_ in ids if id_ >= size] == [size, size + 1, size + 2]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("<|tool|>", "")
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True).input_ids) == text
    assert max(tokenizer(text, split_special_tokens=True).input_ids) < size
    assert tokenizer(text, return_offsets_mapping=True)["offset_mapping"][1] == (1, 6)


def test_a_token_that_exists_keeps_its_id(tokenizer):
    th = tokenizer.convert_tokens_to_ids("th")
    assert tokenizer.add_tokens("th") == 0
    assert tokenizer("other").input_ids == [*tokenizer.encode("o"), th, *tokenizer.encode("er")]
    assert tokenizer.decode(tokenizer("other").input_ids) == "other"


def test_an_unused_id_can_be_taken_into_use():
    tokenizer = SteerlingTokenizer()
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<|unused_100256|>"]}) == 0
    assert tokenizer("a<|unused_100256|>").input_ids[1:] == [100256]
    assert len(tokenizer) == 100281


@pytest.mark.parametrize("token", ["é", "Ġthe", AddedToken("ÿ", special=True)])
def test_a_token_cannot_take_the_string_of_other_bytes(tokenizer, token):
    with pytest.raises(ValueError, match="`new_tokens` has .* choose another string"):
        tokenizer.add_tokens(["<fine>", token])
    with pytest.raises(ValueError, match="`new_tokens` has .* choose another string"):
        tokenizer.add_special_tokens({"extra_special_tokens": ["<fine>", token]})
    assert tokenizer.extra_special_tokens == []
    assert len(tokenizer) == 8200
    assert tokenizer.decode(tokenizer("é the").input_ids) == "é the"


def test_tokens_that_look_at_their_neighbours_follow_the_library(tokenizer):
    tokenizer.add_tokens([AddedToken("<eat>", lstrip=True, rstrip=True), AddedToken("own", single_word=True)])
    eat, own = tokenizer.convert_tokens_to_ids(["<eat>", "own"])
    ids = tokenizer("a <eat> b own brown").input_ids
    assert ids.count(eat) == 1
    assert ids.count(own) == 1
    assert tokenizer.decode(ids) == "a<eat>b own brown"
    with pytest.raises(ValueError, match="swallows whitespace"):
        tokenizer("a <eat> b", return_offsets_mapping=True)


# ---- Saving and copying


def same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    text = TEXT + "<new><|tool|><|eot_id|>"
    batch = [text, "a b"]
    return (
        one.get_vocab() == other.get_vocab()
        and len(one) == len(other)
        and one(batch, padding=True) == other(batch, padding=True)
        and one.decode(one(text).input_ids, skip_special_tokens=True)
        == other.decode(other(text).input_ids, skip_special_tokens=True)
        and one.special_tokens_map == other.special_tokens_map
        and one.all_special_tokens == other.all_special_tokens
        and {id_: str(token) for id_, token in one.added_tokens_decoder.items()}
        == {id_: str(token) for id_, token in other.added_tokens_decoder.items()}
        and (one.chat_template, one.model_max_length, one.padding_side, one.num_ranks, one.instruct)
        == (other.chat_template, other.model_max_length, other.padding_side, other.num_ranks, other.instruct)
    )


@pytest.mark.parametrize("name", ["steerling-8b", "steerling-8b-instruct", "steerling-nano"])
@pytest.mark.parametrize("added", [False, True])
def test_saving_copying_and_pickling_lose_nothing(name, added, tmp_path):
    tokenizer = SteerlingTokenizer.from_pretrained(checkpoint(name))
    if added:
        tokenizer.add_tokens(["<new>"])
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path / "once")
    again = SteerlingTokenizer.from_pretrained(tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "once/cl100k_base.tiktoken").read_bytes() == VOCAB_FILE.read_bytes()
    assert (tmp_path / "once/chat_template.jinja").exists() == (name != "steerling-8b")
    for file in (tmp_path / "once").iterdir():
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes(), file.name
    auto = AutoTokenizer.from_pretrained(tmp_path / "twice")
    assert type(auto) is SteerlingTokenizer
    again.save_pretrained(tmp_path / "once")  # onto the folder it came from
    assert (tmp_path / "once/cl100k_base.tiktoken").read_bytes() == VOCAB_FILE.read_bytes()
    for other in (again, auto, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert same(tokenizer, other)


def test_a_copy_goes_its_own_way_and_shares_the_vocabulary(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    assert len(other) == len(tokenizer) + 1
    assert len(tokenizer("<new>").input_ids) > 1
    assert other._vocabulary is tokenizer._vocabulary


def test_a_vocabulary_file_by_its_path(tmp_path, tokenizer):
    by_file = SteerlingTokenizer.from_pretrained(VOCAB_FILE)
    by_argument = SteerlingTokenizer(str(VOCAB_FILE))
    assert by_file.get_vocab() == by_argument.get_vocab() == SteerlingTokenizer().get_vocab()
    assert tokenizer.save_vocabulary(tmp_path, "my") == (str(tmp_path / "my-cl100k_base.tiktoken"),)
    assert [file.name for file in tmp_path.iterdir()] == ["my-cl100k_base.tiktoken"]


def test_settings_are_kept(tmp_path, tokenizer):
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = 77
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    again = SteerlingTokenizer.from_pretrained(tmp_path)
    assert (again.padding_side, again.model_max_length, again.pad_token_id) == ("right", 77, again.eos_token_id)
    assert SteerlingTokenizer.from_pretrained(tmp_path, padding_side="left").padding_side == "left"


# ---- Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_ranks": 255}, "`num_ranks` is 255; give an integer from 256 to 100,256"),
        ({"num_ranks": 100257}, "`num_ranks` is 100257"),
        ({"num_ranks": 8192.0}, "`num_ranks` is 8192.0"),
        ({"num_ranks": True}, "`num_ranks` is True"),
        ({"instruct": "yes"}, "`instruct` is 'yes'; give True or False"),
        (
            {"vocab_file": "nowhere/at.all"},
            "`vocab_file` is 'nowhere/at.all': .*No such file.*put cl100k_base.tiktoken",
        ),
        ({"added_tokens_decoder": {8193: AddedToken("<|pad|>")}}, "calls id 8193 '<|pad|>'.*correct the arguments"),
        ({"added_tokens_decoder": {100277: AddedToken("<new>")}}, "calls id 100277 '<new>'"),
        ({"added_tokens_decoder": {-1: AddedToken("<new>")}}, "calls id -1 '<new>'"),
        ({"added_tokens_decoder": {100285: AddedToken("<new>")}}, r"has the ids \[100285\].*without a gap"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        SteerlingTokenizer(**arguments)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (VOCAB_FILE.read_bytes()[:1000], "of 1,000 bytes where 1,681,126 are expected: it is truncated"),
        (
            VOCAB_FILE.read_bytes().replace(b"IQ== 0", b"IQ== 1", 1),
            "with sha256 [0-9a-f]{64}: it is not the vocabulary",
        ),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
    ids=["truncated", "changed", "pointer"],
)
def test_a_bad_vocabulary_file(content, words, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "cl100k_base.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=f"`vocab_file` is .*{words}.*put cl100k_base.tiktoken"):
        SteerlingTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("id_", [-1, -100, 8200, 2**40])
def test_ids_out_of_range(tokenizer, id_):
    for method in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
        with pytest.raises(ValueError, match=f"`ids` has {id_}, but the vocabulary has the ids 0 to 8199"):
            method([1, id_])


def test_strings_that_are_no_tokens(tokenizer):
    with pytest.raises(ValueError, match="`tokens` has '日本', which no id is called"):
        tokenizer.convert_tokens_to_string(["a", "日本"])


def test_a_failed_save_leaves_nothing(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`save_directory` is .* create it first"):
        tokenizer.save_vocabulary(tmp_path / "nowhere")
    (tmp_path / "cl100k_base.tiktoken").mkdir()
    with pytest.raises(OSError, match="directory"):
        tokenizer.save_vocabulary(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["cl100k_base.tiktoken"]


def test_the_configurations_name_every_special_token():
    for name in ("steerling-8b", "steerling-8b-instruct", "steerling-nano"):
        tokenizer = SteerlingTokenizer.from_pretrained(checkpoint(name))
        content = json.loads(Path(checkpoint(name), "tokenizer_config.json").read_text(encoding="utf-8"))
        written = {key: value for key, value in content.items() if key.endswith("_token")}
        assert written == tokenizer.special_tokens_map


def test_token_strings_show_bytes(tokenizer):
    assert tokenizer.tokenize("é a") == ["Ã©", "Ġa"]
    assert b"".join(map(bytes_of_token_string, tokenizer.tokenize("日本\n"))) == "日本\n".encode()
