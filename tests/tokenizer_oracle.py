"""Raw tiktoken, built from the vocabulary file by tiktoken's own definition, and texts to compare with it."""

import base64
import functools
import random
import sys
from pathlib import Path

import tiktoken
import tiktoken_ext.openai_public

VOCAB_FILE = Path(__file__).parents[1] / "tokenization" / "cl100k_base.tiktoken"
NANO_RANKS = 8192

BASE_SPECIALS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
    "<|pad|>": 100277,
    "<|bos|>": 100278,
    "<|endofchunk|>": 100279,
    "<|mask|>": 100280,
}
CHAT_SPECIALS = {"<|start_header_id|>": 100281, "<|end_header_id|>": 100282, "<|eot_id|>": 100283}
NANO_ORDER = ("endoftext", "pad", "bos", "endofchunk", "mask", "start_header_id", "end_header_id", "eot_id")
SPECIALS = {
    "steerling-8b": BASE_SPECIALS,
    "steerling-8b-instruct": {**BASE_SPECIALS, **CHAT_SPECIALS},
    "steerling-nano": {f"<|{name}|>": NANO_RANKS + i for i, name in enumerate(NANO_ORDER)},
}


def _ranks_of_file(*args, **kwargs) -> dict[bytes, int]:
    lines = VOCAB_FILE.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


@functools.cache
def oracle(name: str) -> tiktoken.Encoding:
    """Raw tiktoken for one of our checkpoints."""
    original = tiktoken_ext.openai_public.load_tiktoken_bpe
    tiktoken_ext.openai_public.load_tiktoken_bpe = _ranks_of_file  # in place of its download
    try:
        definition = tiktoken_ext.openai_public.cl100k_base()
    finally:
        tiktoken_ext.openai_public.load_tiktoken_bpe = original
    if name == "steerling-nano":
        ranks = definition["mergeable_ranks"].items()
        definition["mergeable_ranks"] = {token: rank for token, rank in ranks if rank < NANO_RANKS}
    return tiktoken.Encoding(**{**definition, "name": name, "special_tokens": SPECIALS[name]})


# The byte-to-unicode table as GPT-2 published it, written out a second time: characters that stand for their own byte,
# then one from U+0100 on for each other byte.
_SHOWN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
_BYTE_OF = {**{chr(byte): byte for byte in _SHOWN}, **{chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}}


def bytes_of_token_string(token: str) -> bytes:
    """What a token string shows."""
    return bytes(_BYTE_OF[character] for character in token)


SCRIPTS = {
    "ascii": (0x00, 0x7F),
    "latin": (0x80, 0x24F),
    "combining": (0x300, 0x36F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x52F),
    "armenian": (0x531, 0x58F),
    "hebrew": (0x590, 0x5FF),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "bengali": (0x980, 0x9FF),
    "tamil": (0xB80, 0xBFF),
    "thai": (0xE00, 0xE7F),
    "tibetan": (0xF00, 0xFFF),
    "georgian": (0x10A0, 0x10FF),
    "ethiopic": (0x1200, 0x137F),
    "punctuation": (0x2000, 0x206F),
    "symbols": (0x2100, 0x27BF),
    "kana": (0x3040, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "private": (0xE000, 0xF8FF),
    "gothic": (0x10330, 0x1034F),
    "mathematics": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1FAFF),
    "anything": (0x0, sys.maxunicode),
}
SPACES = " \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
DIGITS = "0123456789٠١٢٣५६७８９²½Ⅷ一"
WORDS = [
    "don't",
    "I'LL",
    "we'Ve",
    "naïve",
    "x_1",
    "http://a.b/c?d=e",
    "def f(x):\n\treturn x",
    "1,234.50",
    "e\u0301",
    "ﬁ",
]
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇭", "👍🏽", "❤️", "1️⃣"]
LOOKALIKES = ["<|", "|>", "<|mask", "mask|>", "<|MASK|>", "<|mask |>", "<<|mask|>>", "<|unused_100256|>", "<|im_end|>"]


def _script(rng: random.Random) -> str:
    first, last = rng.choice(list(SCRIPTS.values()))
    characters = (chr(rng.randint(first, last)) for _ in range(rng.randint(1, 12)))
    return "".join(c for c in characters if not 0xD800 <= ord(c) <= 0xDFFF)


def _broken_utf8(rng: random.Random) -> str:
    return rng.randbytes(rng.randint(1, 12)).decode("utf-8", "replace")


def random_text(rng: random.Random, specials: list[str]) -> str:
    """A text without surrogates, of up to eight pieces: scripts, emoji, spaces, numbers, words, special strings."""
    makers = [
        _script,
        _script,
        _script,
        _broken_utf8,
        lambda rng: "".join(rng.choices(SPACES, k=rng.randint(1, 9))),
        lambda rng: rng.choice(" \n") * rng.randint(1, 40),
        lambda rng: "".join(rng.choices(DIGITS, k=rng.randint(1, 9))),
        lambda rng: rng.choice(WORDS),
        lambda rng: rng.choice(EMOJI),
        lambda rng: rng.choice(LOOKALIKES),
        lambda rng: rng.choice(specials),
    ]
    return "".join(rng.choice(makers)(rng) for _ in range(rng.randint(0, 8)))


def random_surrogates(rng: random.Random) -> str:
    """A text that no UTF-8 can hold: lone surrogates, pairs of them, undecodable bytes as Python escapes them."""
    makers = [
        lambda rng: chr(rng.randint(0xD800, 0xDFFF)),
        lambda rng: "\ud83d\ude00",
        lambda rng: rng.randbytes(6).decode("utf-8", "surrogateescape"),
        _script,
    ]
    return "".join(rng.choice(makers)(rng) for _ in range(rng.randint(1, 8)))
