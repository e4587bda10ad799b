"""The tokenizer of Steerling: tiktoken's cl100k_base, or its first ranks, with Steerling's special tokens behind them."""

import base64
import hashlib
import shutil
from pathlib import Path
from typing import Any

import tiktoken
from transformers import AddedToken, PreTrainedTokenizer

VOCABULARY = "cl100k_base.tiktoken"
SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
RANKS = 100256
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"""
    r"""\s+(?!\S)|\s"""
)
INHERITED = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
BASE = {"<|endoftext|>": 100257, "<|pad|>": 100277, "<|bos|>": 100278, "<|endofchunk|>": 100279, "<|mask|>": 100280}
INSTRUCT = {"<|start_header_id|>": 100281, "<|end_header_id|>": 100282, "<|eot_id|>": 100283}
NAMED = {
    "endofchunk_token": "<|endofchunk|>",
    "start_header_token": "<|start_header_id|>",
    "end_header_token": "<|end_header_id|>",
    "eot_token": "<|eot_id|>",
}


def _byte_alphabet() -> str:
    """GPT-2's table: a printable character for each byte, so that the string of a token keeps its bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return "".join(table[byte] for byte in range(256))


ALPHABET = _byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def _to_string(token: bytes) -> str:
    return token.decode("latin-1").translate(ALPHABET)


def _to_bytes(token: str) -> bytes:
    """The bytes of a token's string; characters outside the table stand for themselves."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode("utf-8", "replace")


def _read_ranks(vocab_file: str, num_ranks: int | None) -> dict[bytes, int]:
    if not Path(vocab_file).is_file():
        raise FileNotFoundError(f"`vocab_file` is {vocab_file!r}: no such file; put {VOCABULARY} there.")
    if num_ranks is not None and (type(num_ranks) is not int or not 256 <= num_ranks <= RANKS):
        raise ValueError(
            f"`num_ranks` is {num_ranks!r}: choose a whole number from 256 (the bytes) to {RANKS}, or None."
        )
    content = Path(vocab_file).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"`vocab_file` {vocab_file!r} has sha256 {digest}, and {VOCABULARY} has {SHA256}: the file is damaged, cut off "
            "or another one; copy it again."
        )
    lines = content.splitlines()[:num_ranks]
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


class _Vocabulary:
    """What never changes: the encoding, and the string and the bytes of every id. Copies share it."""

    def __init__(self, vocab_file: str, num_ranks: int | None, instruct: bool):
        ranks = _read_ranks(vocab_file, num_ranks)
        self.encoding = tiktoken.Encoding(
            "steerling", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )
        names = {**BASE, **(INSTRUCT if instruct else {})}
        if num_ranks is None:
            self.special = dict(sorted({**names, **INHERITED}.items(), key=lambda item: item[1]))
        else:
            self.special = {token: num_ranks + i for i, token in enumerate(names)}
        size = max(self.special.values()) + 1
        self.strings = [f"<|unused_{i}|>" for i in range(size)]
        self.bytes = [string.encode() for string in self.strings]
        for token, rank in ranks.items():
            self.strings[rank], self.bytes[rank] = _to_string(token), token
        for token, i in self.special.items():
            self.strings[i], self.bytes[i] = token, token.encode()
        self.ids = {string: i for i, string in enumerate(self.strings)}

    def __deepcopy__(self, memo: dict) -> "_Vocabulary":
        return self


class SteerlingTokenizer(PreTrainedTokenizer):
    """
    Exactly tiktoken's ids, without any network.

    Special tokens that stand in a text become their ids, as everywhere in transformers; that is how a mask to fill is
    written. `split_special_tokens=True` keeps them plain text. Neither bos nor eos is added. Token strings are those of
    GPT-2's byte table, so they keep bytes that are no valid UTF-8; ids that no token has are called `<|unused_ID|>`, which
    no text encodes to. `apply_chat_template(..., sanitize_control_tokens=True)` keeps a message from forging control tokens.

    Args:
        vocab_file: Path of cl100k_base.tiktoken; by default the copy beside this module.
        num_ranks: Use only so many ranks (a prefix of a byte-pair encoding is one as well), special tokens right behind
            them; `None` for all, special tokens at the released ids.
        instruct: Whether there are the three header and end-of-turn tokens of instruct checkpoints.
        kwargs: Arguments of `PreTrainedTokenizer`.

    Raises:
        FileNotFoundError: There is no vocabulary file.
        ValueError: The file is not cl100k_base.tiktoken (its sha256 differs), or `num_ranks` is out of range.
    """

    vocab_files_names = {"vocab_file": VOCABULARY}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self, vocab_file: str | None = None, num_ranks: int | None = None, instruct: bool = False, **kwargs: Any
    ):
        self.vocab_file = str(vocab_file or Path(__file__).resolve().with_name(VOCABULARY))
        self._vocabulary = _Vocabulary(self.vocab_file, num_ranks, instruct)
        special = self._vocabulary.special
        self._added_tokens_decoder = {
            i: AddedToken(token, special=True, normalized=False) for token, i in special.items()
        }
        named = {name: token for name, token in NAMED.items() if token in special}
        defaults = {
            "bos_token": "<|bos|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
            "mask_token": "<|mask|>",
            "model_specific_special_tokens": named,
            "extra_special_tokens": [token for token in special if token in INHERITED],
            "clean_up_tokenization_spaces": False,
            "special_tokens_pattern": "none",
        }
        super().__init__(num_ranks=num_ranks, instruct=instruct, **{**defaults, **kwargs})

    @property
    def vocab_size(self) -> int:
        """Number of ids without those that a user added."""
        return len(self._vocabulary.strings)

    def get_vocab(self) -> dict[str, int]:
        """Id of every token's string: dense from 0, added tokens included."""
        return {**self._vocabulary.ids, **self._added_tokens_encoder}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the vocabulary file to `save_directory`, whole or not at all."""
        target = Path(save_directory) / (f"{filename_prefix}-{VOCABULARY}" if filename_prefix else VOCABULARY)
        if target.exists() and target.samefile(self.vocab_file):
            return (str(target),)
        partial = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(self.vocab_file, partial)
        partial.replace(target)
        return (str(target),)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._vocabulary.strings[i] for i in self._vocabulary.encoding.encode_ordinary(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocabulary.ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        self._check_id(index)
        return self._vocabulary.strings[index]

    def _check_id(self, index: int) -> None:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"`token_ids` hold {index}, which no token has; ids are 0..{len(self) - 1}.")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens' strings; bytes that are no UTF-8 become U+FFFD, as in tiktoken."""
        added = self._added_tokens_encoder
        parts = (token.encode() if token in added else _to_bytes(token) for token in tokens)
        return b"".join(parts).decode("utf-8", "replace")

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any):
        # Ids directly from strings: the library's route goes through the string of each token.
        if not kwargs.get("is_split_into_words") and not kwargs.get("sanitize_control_tokens"):
            split = kwargs.get("split_special_tokens", self.split_special_tokens)
            text, text_pair = self._encode_directly(text, split), self._encode_directly(text_pair, split)
        return super()._encode_plus(text, text_pair, **kwargs)

    def _encode_directly(self, text: Any, split_special_tokens: bool) -> Any:
        """`text`, or those of its items, as ids where no added token occurs in it; anything else as it is."""

        def plain(item: Any) -> bool:
            if not isinstance(item, str) or not item:
                return False
            return split_special_tokens or not any(token in item for token in self._added_tokens_encoder)

        encoding = self._vocabulary.encoding
        if isinstance(text, str):
            return encoding.encode_ordinary(text) if plain(text) else text
        if isinstance(text, (list, tuple)) and any(map(plain, text)):
            encoded = iter(encoding.encode_ordinary_batch([item for item in text if plain(item)]))
            return [next(encoded) if plain(item) else item for item in text]
        return text

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        text = b"".join(self._bytes_of(i) for i in ids if i not in skipped).decode("utf-8", "replace")
        if self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces:
            text = self.clean_up_tokenization(text)
        return text

    def _bytes_of(self, index: int) -> bytes:
        if index in self._added_tokens_decoder:
            return self._added_tokens_decoder[index].content.encode()
        self._check_id(index)
        return self._vocabulary.bytes[index]


__all__ = ["SteerlingTokenizer"]
