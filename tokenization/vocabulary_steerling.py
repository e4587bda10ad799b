"""
The vocabulary of Steerling: what its file and its layout fix, of which a tokenizer has one.

The file lies in the tokenizer's folder and its hash is checked; nothing here ever asks a network.
"""

import base64
import functools
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiktoken

VOCAB_FILE_NAME = "cl100k_base.tiktoken"
VOCAB_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
VOCAB_BYTES = 1_681_126
RANKS = 100_256
SINGLE_BYTES = 256  # the first ranks are the single bytes, so any prefix of at least these encodes any text

# How cl100k_base cuts a text before it merges bytes; this is part of the encoding's definition.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# tiktoken's regular expressions keep a way back for every character of whitespace, and panic, which no `except Exception`
# catches, when that are a million. Longer runs than this are cut where PATTERN cuts them.
LONG_WHITESPACE = 100_000
_WHITESPACE = "\t-\r\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of PATTERN; Python's has more
_LONG_RUN = re.compile(f"(?<![{_WHITESPACE}])[{_WHITESPACE}]{{{LONG_WHITESPACE},}}")

# Attribute of the tokenizer -> (string, id in the released vocabulary), in the order of a shortened vocabulary.
BASE_SPECIAL_TOKENS = {
    "eos_token": ("<|endoftext|>", 100257),
    "pad_token": ("<|pad|>", 100277),
    "bos_token": ("<|bos|>", 100278),
    "endofchunk_token": ("<|endofchunk|>", 100279),
    "mask_token": ("<|mask|>", 100280),
}
INSTRUCT_SPECIAL_TOKENS = {
    "start_header_token": ("<|start_header_id|>", 100281),
    "end_header_token": ("<|end_header_id|>", 100282),
    "eot_token": ("<|eot_id|>", 100283),
}
# What cl100k_base brings along and Steerling has no use for; a shortened vocabulary leaves them out.
INHERITED_SPECIAL_TOKENS = {
    "fim_prefix_token": ("<|fim_prefix|>", 100258),
    "fim_middle_token": ("<|fim_middle|>", 100259),
    "fim_suffix_token": ("<|fim_suffix|>", 100260),
    "endofprompt_token": ("<|endofprompt|>", 100276),
}


def _bytes_to_unicode() -> dict[int, str]:
    """
    The byte-to-unicode table of GPT-2, by which a token string shows any bytes: printable bytes stand for themselves,
    the others for the characters from U+0100 on. See Radford et al. (2019), "Language Models are Unsupervised Multitask
    Learners".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


_CHARACTER_OF_BYTE = _bytes_to_unicode()
_BYTE_OF_CHARACTER = {ord(character): byte for byte, character in _CHARACTER_OF_BYTE.items()}


def token_string(token: bytes) -> str:
    """How a token of these bytes is written."""
    return token.decode("latin-1").translate(_CHARACTER_OF_BYTE)


def token_bytes(token: str) -> bytes:
    """The inverse of `token_string`."""
    return token.translate(_BYTE_OF_CHARACTER).encode("latin-1")


class SteerlingVocabulary:
    """
    What the vocabulary file and the layout fix. It never changes, so tokenizers share it and copies do not copy it.

    Attributes:
        specials: Attribute name -> (string, id) of the special tokens.
        encoding: tiktoken's encoder; it also decodes every id.
        tokens: The string of each id.
        ids: The id of each string; the inverse of `tokens`.
    """

    def __init__(self, data: bytes, num_ranks: int, instruct: bool):
        self.data, self.num_ranks, self.instruct = data, num_ranks, instruct
        ranks: dict[bytes, int] = {}
        for line in data.splitlines()[:num_ranks]:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        self.specials = _special_tokens(num_ranks, instruct)
        size = 1 + max(id_ for _, id_ in self.specials.values())
        named = {id_: token for token, id_ in self.specials.values()}
        # An id without a token gets a name, so that ids and strings correspond one to one.
        rest = {id_: named.get(id_, f"<|unused_{id_}|>") for id_ in range(num_ranks, size)}
        self.tokens = [*map(token_string, ranks), *rest.values()]
        self.ids = {token: id_ for id_, token in enumerate(self.tokens)}
        self.encoding = tiktoken.Encoding(
            f"steerling_{size}",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens={token: id_ for id_, token in rest.items()},
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special; those of tiktoken, in linear time for runs of any character."""
        if len(text) < LONG_WHITESPACE:
            return self.encoding.encode_ordinary(text)
        return [id_ for piece in _pieces(text) for id_ in self.encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in threads."""
        long = {i: self.encode(text) for i, text in enumerate(texts) if _LONG_RUN.search(text)}
        short = self.encoding.encode_ordinary_batch(["" if i in long else text for i, text in enumerate(texts)])
        return [long.get(i, ids) for i, ids in enumerate(short)]

    def __deepcopy__(self, memo: dict) -> "SteerlingVocabulary":
        return self

    def __reduce__(self):
        return vocabulary, (self.data, self.num_ranks, self.instruct)


@functools.lru_cache(maxsize=4)
def vocabulary(data: bytes, num_ranks: int, instruct: bool) -> SteerlingVocabulary:
    """The vocabulary of a file's content: its first ranks, with the tokens of chat or without."""
    return SteerlingVocabulary(data, num_ranks, instruct)


def _pieces(text: str) -> Iterator[str]:
    """
    The text, cut in its long runs of whitespace, only where PATTERN ends a match.

    Of a run that is not at the text's end, PATTERN takes first all up to the last line break (by `\\s*[\\r\\n]`), then all
    but the last character (by `\\s+(?!\\S)`), which goes with what follows. At the end of a piece it takes all that is left
    (by `\\s++$`), which keeps no way back.
    """
    last = 0
    for run in _LONG_RUN.finditer(text):
        if run.end() == len(text):
            break
        behind_break = 1 + max(text.rfind("\n", run.start(), run.end()), text.rfind("\r", run.start(), run.end()))
        for cut in (behind_break, run.end() - 1):
            if cut > max(last, run.start()):
                yield text[last:cut]
                last = cut
    yield text[last:]


def _special_tokens(num_ranks: int, instruct: bool) -> dict[str, tuple[str, int]]:
    tokens = {**BASE_SPECIAL_TOKENS, **(INSTRUCT_SPECIAL_TOKENS if instruct else {})}
    if num_ranks == RANKS:
        return {**tokens, **INHERITED_SPECIAL_TOKENS}
    return {name: (token, num_ranks + i) for i, (name, (token, _)) in enumerate(tokens.items())}


def read_vocabulary_file(vocab_file: str | os.PathLike[str] | None) -> bytes:
    """The content of the vocabulary file, checked. Every problem is a ValueError: `from_pretrained` hides OSErrors."""
    remedy = f"put {VOCAB_FILE_NAME} (sha256 {VOCAB_SHA256}) into the tokenizer's folder"
    path = Path(vocab_file) if vocab_file is not None else Path(__file__).with_name(VOCAB_FILE_NAME)
    given = f"`vocab_file` is {None if vocab_file is None else str(path)!r}"
    try:
        data = path.read_bytes()
    except OSError as error:
        beside = "" if vocab_file is not None else f", and beside the code there is none either ({path.parent})"
        raise ValueError(f"{given}{beside}: it cannot be read ({error.strerror}); {remedy}.") from error
    if len(data) < VOCAB_BYTES:
        raise ValueError(
            f"{given}, of {len(data):,} bytes where {VOCAB_BYTES:,} are expected: it is truncated, or a Git LFS pointer; "
            f"{remedy}."
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != VOCAB_SHA256:
        raise ValueError(f"{given}, with sha256 {digest}: it is not the vocabulary of Steerling; {remedy}.")
    return data
