"""Tokenizer of Steerling: tiktoken's cl100k_base with Steerling's special tokens, as a transformers tokenizer."""

import os
import re
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy

from .chat_steerling import (
    WORD_JOINER,
    ChatMark,
    as_plain,
    check_conversations,
    rewrite_strings,
    schemas_of,
    strings_of,
)
from .encodings_steerling import TracedEncoding, moved_offsets
from .matching_steerling import any_of
from .strings_steerling import check_text
from .vocabulary_steerling import (
    INHERITED_SPECIAL_TOKENS,
    INSTRUCT_SPECIAL_TOKENS,
    RANKS,
    SINGLE_BYTES,
    VOCAB_FILE_NAME,
    read_vocabulary_file,
    token_bytes,
    vocabulary,
)

MORE_OUTPUTS = ("return_token_type_ids", "return_special_tokens_mask", "return_length")
PARALLEL_CHARACTERS = 50_000  # below that, starting threads takes longer than they save


class SteerlingTokenizer(PreTrainedTokenizer):
    r"""
    Byte-level BPE of Steerling: the ranks of cl100k_base, and special tokens behind them.

    - Ids are tiktoken's. A text without special or added tokens goes to tiktoken in one piece, a list of them in one
      batch; decoding joins bytes. Bytes that are no UTF-8 become U+FFFD in decoded text, as they do in tiktoken.
    - A token string shows its bytes by the byte-to-unicode table, so `convert_ids_to_tokens` and `convert_tokens_to_ids`
      are inverse to each other on every id.
    - Every id below `len(tokenizer)` has a string. Ids that the released vocabulary leaves free are called
      `<|unused_N|>`; a text that contains such a name does not become the id.
    - No bos or eos is put around a text. Special strings in a text become their ids, which is how an infill is written;
      with `split_special_tokens=True` they stay text.
    - Lone surrogates in a text become U+FFFD and pairs of them the character they stand for, as in tiktoken.
    - `return_offsets_mapping=True` works on single texts and lists of texts.
    - Padding goes to the left unless `padding_side` says otherwise, because generation continues at the right.

    Args:
        vocab_file: Path of `cl100k_base.tiktoken`. None is the file beside this module.
        num_ranks: Keep the first ranks only, which is a BPE again, and let the special tokens follow without a gap; 256
            to 100,256. None or 100,256 is the released vocabulary.
        instruct: Whether there are the three tokens of chat: start and end of a header, end of a turn.
        kwargs: For the base class. Special tokens are attributes: `bos_token`, `eos_token`, `pad_token`, `mask_token`,
            `endofchunk_token`; `start_header_token`, `end_header_token`, `eot_token` with `instruct`; `fim_prefix_token`,
            `fim_middle_token`, `fim_suffix_token`, `endofprompt_token` with all ranks. Each has its `_id`, and is None
            where it does not exist.

    Raises:
        ValueError: The vocabulary file is missing, truncated or another one, or an argument is out of range.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE_NAME}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    SPECIAL_TOKENS_ATTRIBUTES = [
        *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
        "endofchunk_token",
        *INSTRUCT_SPECIAL_TOKENS,
        *INHERITED_SPECIAL_TOKENS,
    ]

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        *,
        num_ranks: int | None = None,
        instruct: bool = False,
        **kwargs: Any,
    ):
        if num_ranks is not None and (type(num_ranks) is not int or not SINGLE_BYTES <= num_ranks <= RANKS):
            raise ValueError(
                f"`num_ranks` is {num_ranks!r}; give an integer from {SINGLE_BYTES} to {RANKS:,}, or None."
            )
        if not isinstance(instruct, bool):
            raise ValueError(f"`instruct` is {instruct!r}; give True or False.")
        self.num_ranks = num_ranks
        self.instruct = instruct
        # The base class asks for the vocabulary while it is initialised.
        self._vocabulary = vocabulary(read_vocabulary_file(vocab_file), num_ranks or RANKS, instruct)
        self._added_tokens_decoder = {
            id_: AddedToken(token, normalized=False, special=True) for token, id_ in self._vocabulary.specials.values()
        }
        for name, (token, _) in self._vocabulary.specials.items():
            kwargs.setdefault(name, token)
        self._check_added_tokens(kwargs.get("added_tokens_decoder") or {})
        super().__init__(num_ranks=num_ranks, instruct=instruct, **kwargs)

    # ---- Vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of ids without added tokens; special tokens and unused ids count."""
        return len(self._vocabulary.tokens)

    def get_vocab(self) -> dict[str, int]:
        """The id of every token string, added tokens included: each id from 0 to `len(tokenizer) - 1` exactly once."""
        return {**self._vocabulary.ids, **self._added_tokens_encoder}

    def _update_total_vocab_size(self) -> None:
        # Every way to add a token ends here.
        self._update_trie()
        self.total_vocab_size = self.vocab_size + sum(id_ >= self.vocab_size for id_ in self._added_tokens_decoder)
        self._added_tokens_regex: re.Pattern[str] | None = (
            None  # made when it is first needed: tokens may be added one by one
        )
        added = self._added_tokens_decoder.values()
        self._added_tokens_look_around = any(token.lstrip or token.rstrip or token.single_word for token in added)

    @property
    def _added_tokens_pattern(self) -> re.Pattern[str]:
        if self._added_tokens_regex is None:
            self._added_tokens_regex = re.compile(f"({any_of(self._added_tokens_encoder)})")
        return self._added_tokens_regex

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """As in the base class, which would note a name as special before `_add_tokens` refuses it."""
        if not isinstance(special_tokens_dict, Mapping):
            raise ValueError(
                f"`special_tokens_dict` is of the type {type(special_tokens_dict).__name__}; give a dictionary, as "
                "{'extra_special_tokens': ['<|name|>']}."
            )
        for tokens in special_tokens_dict.values():
            for token in tokens if isinstance(tokens, (list, tuple)) else [tokens]:
                self._check_name(str(token))
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        for token in new_tokens:
            self._check_name(str(token))
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _check_name(self, name: str) -> None:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`new_tokens` has {name!r}, which has a lone surrogate; choose another string."
            ) from error
        # "é" is how byte E9 is shown; as an added token it would take that byte's id, and texts would lose bytes.
        id_ = self._vocabulary.ids.get(name, RANKS)
        if id_ < self._vocabulary.num_ranks and token_bytes(name) != name.encode("utf-8", "surrogatepass"):
            raise ValueError(
                f"`new_tokens` has {name!r}, which already is the vocabulary's string for the bytes {token_bytes(name)!r}; "
                f"choose another string, such as '<|{name}|>'."
            )

    def _check_added_tokens(self, tokens: Mapping[int, str | AddedToken]) -> None:
        """Refuse the added tokens of another vocabulary, which the base class would take over as they are."""
        given = f"`num_ranks` is {self.num_ranks} and `instruct` is {self.instruct}"
        for id_, token in tokens.items():
            name = str(token)
            self._check_name(name)
            here = self._vocabulary.tokens[id_] if 0 <= id_ < self.vocab_size else None
            if id_ < 0 or here != (name if id_ < self.vocab_size or name in self._vocabulary.ids else None):
                raise ValueError(
                    f"`added_tokens_decoder` calls id {id_} {name!r}, but {given}, so that id is {here!r} and the id of that "
                    f"string is {self._vocabulary.ids.get(name)}; correct the arguments."
                )
        beyond = sorted(id_ for id_ in tokens if id_ >= self.vocab_size)
        if beyond != list(range(self.vocab_size, self.vocab_size + len(beyond))):
            raise ValueError(
                f"`added_tokens_decoder` has the ids {beyond}, which do not follow without a gap on the {self.vocab_size:,} "
                f"of the vocabulary, since {given}; correct the arguments."
            )

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """
        Write the vocabulary file, whole or not at all, also if the file it came from is gone.

        Args:
            save_directory: An existing folder.
            filename_prefix: Put before the name of the file, with a hyphen.

        Returns:
            The path of the file.
        """
        if filename_prefix and Path(filename_prefix).name != filename_prefix:
            raise ValueError(f"`filename_prefix` is {filename_prefix!r}; give a part of a name, not a path.")
        folder = Path(save_directory)
        if not folder.is_dir():
            raise ValueError(f"`save_directory` is {str(folder)!r}, which is no folder; create it first.")
        path = folder / (f"{filename_prefix}-{VOCAB_FILE_NAME}" if filename_prefix else VOCAB_FILE_NAME)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_bytes(self._vocabulary.data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return (str(path),)

    # ---- Text to ids

    def tokenize(self, text: Any, **kwargs: Any) -> list[str]:  # type: ignore[override]  # as in the slow base class
        """As in the base class; other values than a string are refused."""
        if not isinstance(text, str):
            raise ValueError(f"`text` is of the type {type(text).__name__}; give a string.")
        return super().tokenize(text, **kwargs)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._vocabulary.tokens[id_] for id_ in self._vocabulary.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocabulary.ids.get(token)

    def _text_to_ids(self, text: str, split_special_tokens: bool) -> list[int]:
        encode = self._vocabulary.encode
        if split_special_tokens or not self._added_tokens_pattern.search(text):
            return encode(text)
        if self._added_tokens_look_around:  # rare, and the base class knows their rules
            return [self._convert_token_to_id_with_added_voc(token) for token in self.tokenize(text)]
        ids: list[int] = []
        for i, piece in enumerate(self._added_tokens_pattern.split(text)):  # text, token, text, token, ..., text
            ids += encode(piece) if i % 2 == 0 else [self._added_tokens_encoder[piece]]
        return ids

    def _texts_to_ids(self, texts: Sequence[str], split_special_tokens: bool) -> list[list[int]]:
        in_parallel = len(texts) > 1 and sum(map(len, texts)) >= PARALLEL_CHARACTERS
        if in_parallel and (split_special_tokens or not any(map(self._added_tokens_pattern.search, texts))):
            return self._vocabulary.encode_batch(texts)
        return [self._text_to_ids(text, split_special_tokens) for text in texts]

    def _marked_to_ids(self, rendered: str, mark: ChatMark) -> tuple[list[int], str, list[int]]:
        """
        Ids of a rendered chat in which control tokens with a mark are text; the chat without marks, and for each of its
        characters where it stood among them.
        """
        encode = self._vocabulary.encode
        pieces = list(mark.read(rendered, list(self._added_tokens_encoder)))
        clean = "".join(piece for piece, _, _ in pieces)
        places = [place for piece, start, _ in pieces for place in range(start, start + len(piece))]
        ids: list[int] = []
        if self._added_tokens_look_around:  # see `_text_to_ids`
            for piece, _, is_text in pieces:
                ids += encode(piece) if is_text else self._text_to_ids(piece, False)
            return ids, clean, places
        text: list[str] = []
        for piece, _, is_text in pieces:
            parts = [piece] if is_text else self._added_tokens_pattern.split(piece)  # text, token, ..., text
            text.append(parts[0])
            for token, behind in zip(parts[1::2], parts[2::2]):
                ids += [*encode("".join(text)), self._added_tokens_encoder[token]]
                text = [behind]
        return ids + encode("".join(text)), clean, places

    def _encode_plus(  # type: ignore[override]  # the base classes differ too; it is called by keyword
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_offsets_mapping: bool = False,
        split_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """What `__call__` and `encode` do; a text and a list of texts become ids without strings in between."""
        is_text = isinstance(text, str)
        are_texts = is_text or (isinstance(text, (list, tuple)) and all(isinstance(item, str) for item in text))
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names

        mark: ChatMark | None = kwargs.pop("chat_mark", None)  # of apply_chat_template
        self._check_inputs(text, text_pair, truncation_strategy, max_length)
        if not are_texts or text_pair is not None or is_split_into_words or return_overflowing_tokens:
            if mark is not None:
                raise ValueError(
                    "`tokenizer_kwargs` has an argument that chats cannot be sanitized with; leave `is_split_into_words`, "
                    "`return_overflowing_tokens` and `text_pair` out."
                )
            if return_offsets_mapping:
                raise ValueError(
                    "`return_offsets_mapping` is True, which works for a text or a list of texts only: not for pairs, words, "
                    "ids or overflowing tokens; leave it out, or give texts."
                )
            return super()._encode_plus(
                text,
                text_pair,
                add_special_tokens=add_special_tokens,
                padding_strategy=padding_strategy,
                truncation_strategy=truncation_strategy,
                max_length=max_length,
                is_split_into_words=is_split_into_words,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side,
                return_tensors=return_tensors,
                return_attention_mask=return_attention_mask,
                return_overflowing_tokens=return_overflowing_tokens,
                split_special_tokens=split_special_tokens,
                **kwargs,
            )

        texts = [text] if is_text else text
        places: list[list[int]] | None = None
        if mark is None:
            ids_of_texts = self._texts_to_ids(texts, split_special_tokens)
        else:
            ids_of_texts, texts, places = map(list, zip(*(self._marked_to_ids(text, mark) for text in texts)))
        # Short texts owe most of their time to the library's preparation, so it is called where there is something to do.
        around = self.num_special_tokens_to_add() if add_special_tokens else 0
        is_cut = truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE
        rows: list[Any]
        if around or is_cut or any(kwargs.get(output) for output in MORE_OUTPUTS):
            rows = [
                self.prepare_for_model(
                    ids,
                    add_special_tokens=add_special_tokens,
                    truncation=truncation_strategy.value,
                    max_length=max_length,
                    return_attention_mask=False,
                    **kwargs,
                )
                for ids in ids_of_texts
            ]
        else:
            rows = [{"input_ids": ids} for ids in ids_of_texts]
            for ids in ids_of_texts:
                self._eventual_warn_about_too_long_sequence(ids, max_length, kwargs.get("verbose", True))
        data: dict[str, Any] = {key: [row[key] for row in rows] for key in (rows[0] if rows else ["input_ids"])}
        lengths = [len(row) for row in data["input_ids"]]
        if padding_strategy != PaddingStrategy.DO_NOT_PAD:
            data = dict(
                self.pad(
                    data,
                    padding=padding_strategy.value,
                    max_length=max_length,
                    pad_to_multiple_of=pad_to_multiple_of,
                    padding_side=padding_side,
                    return_attention_mask=return_attention_mask,
                )
            )
        elif return_attention_mask:
            data["attention_mask"] = [[1] * length for length in lengths]
        if return_offsets_mapping:
            data["offset_mapping"] = [
                self._offset_mapping(*row, add_special_tokens, padding_side or self.padding_side)
                for row in zip(texts, ids_of_texts, lengths, map(len, data["input_ids"]))
            ]
        rendered = data.get("offset_mapping") if places is None else moved_offsets(data.get("offset_mapping"), places)
        if is_text:
            data = {key: value[0] for key, value in data.items()}
        if rendered is None:
            return BatchEncoding(data, tensor_type=return_tensors, prepend_batch_axis=is_text)
        return TracedEncoding(data, rendered, tensor_type=return_tensors, prepend_batch_axis=is_text)

    def _check_inputs(
        self, text: Any, text_pair: Any, truncation_strategy: TruncationStrategy, max_length: int | None
    ) -> None:
        for name, value in (("text", text), ("text_pair", text_pair)):
            check_text(name, value, len(self))
        if max_length is not None and (
            isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 0
        ):
            raise ValueError(f"`max_length` is {max_length!r}; give a number of tokens, or None.")
        if max_length == 0 and truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE:
            raise ValueError("`max_length` is 0, to which nothing can be truncated; give 1 or more.")

    def _offset_mapping(
        self, text: str, ids: list[int], length: int, padded: int, add_special_tokens: bool, padding_side: str
    ) -> list[tuple[int, int]]:
        """
        Where each token of a row stands in its text.

        Args:
            text, ids: A text and all of its ids.
            length, padded: Length of its row, after truncation, without and with padding.

        Returns:
            For each position of the row the half-open range of the characters that the token has bytes of; (0, 0) for
            padding and for tokens that the text does not have.
        """
        pieces = [self._id_to_bytes(id_) for id_ in ids]
        if b"".join(pieces) != text.encode("utf-8", "surrogatepass"):
            raise ValueError(
                "`return_offsets_mapping` is True, but the tokens do not add up to the text: it has surrogates, or an "
                "added token swallows whitespace. Repair the text, or leave the argument out."
            )
        character_of_byte = [i for i, character in enumerate(text) for _ in character.encode("utf-8")]
        ends = list(accumulate(map(len, pieces)))
        offsets = [
            (character_of_byte[end - len(piece)], character_of_byte[end - 1] + 1) for piece, end in zip(pieces, ends)
        ]
        kept = length - (self.num_special_tokens_to_add() if add_special_tokens else 0)
        offsets = offsets[len(offsets) - kept :] if self.truncation_side == "left" else offsets[:kept]
        if add_special_tokens:  # ids that the base class puts around, if it was told to
            row: list[Any] = self.build_inputs_with_special_tokens(cast(list, offsets))
            offsets = [entry if isinstance(entry, tuple) else (0, 0) for entry in row]
        padding = [(0, 0)] * (padded - length)
        return padding + offsets if padding_side == "left" else offsets + padding

    # ---- Ids to text

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise ValueError(
                f"`ids` has {index}, but the vocabulary has the ids 0 to {len(self) - 1}; drop or replace others, such as "
                f"the -100 of labels, first."
            )
        return self._vocabulary.tokens[index]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """
        The text of token strings; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: A string is no token of this tokenizer.
        """
        try:
            pieces = [self._token_to_bytes(token) for token in tokens]
        except (UnicodeEncodeError, AttributeError) as error:
            wrong = (
                error.object
                if isinstance(error, UnicodeEncodeError)
                else next(t for t in tokens if not isinstance(t, str))
            )
            raise ValueError(
                f"`tokens` has {wrong!r}, which no id is called; give strings of `tokenize` or `convert_ids_to_tokens`."
            ) from error
        return b"".join(pieces).decode("utf-8", errors="replace")

    def _token_to_bytes(self, token: str) -> bytes:
        return token.encode("utf-8", "surrogatepass") if token in self._added_tokens_encoder else token_bytes(token)

    def _id_to_bytes(self, id_: int) -> bytes:
        return self._token_to_bytes(self.convert_ids_to_tokens(int(id_)))

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str | list[str]:
        """
        The text of ids: a list, array or tensor of them, or a batch.

        Args:
            token_ids: Ids, in one sequence or several.
            skip_special_tokens: Leave special tokens out.
            kwargs: `clean_up_tokenization_spaces` (default False) as in the base class.

        Returns:
            A string, or a list of strings for several sequences.

        Raises:
            ValueError: An id is out of range.
            TypeError: It is no id.
        """
        try:
            # The base class tests the type of every id, which takes longer than to decode them.
            if isinstance(token_ids, list) and token_ids:
                if isinstance(token_ids[0], int):
                    return self._decode(token_ids, skip_special_tokens, **kwargs)
                if all(isinstance(row, list) and row and isinstance(row[0], int) for row in token_ids):
                    return [self._decode(row, skip_special_tokens, **kwargs) for row in token_ids]
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"`token_ids` is {reprlib.repr(token_ids)}; give integers: one, or a list, array or tensor of them, or of lists "
                f"of them ({error})."
            ) from error

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            special = set(self.all_special_ids)
            ids = [id_ for id_ in ids if id_ not in special]
        try:
            data = self._vocabulary.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):  # added tokens, or ids out of range, of which tiktoken knows nothing
            data = b"".join(map(self._id_to_bytes, ids))
        text = data.decode("utf-8", errors="replace")
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    # ---- Chat

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        padding: Any = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Write messages in the form that the chat template gives them. See the base class; what differs:

        Args:
            sanitize_control_tokens: Special strings in messages, tools, documents and template variables stay text, so
                that none of them can forge a header, an end of turn or a mask; True unless said otherwise. Ids
                (`tokenize=True`) are those of the very characters. A string (`tokenize=False`) cannot tell text from token,
                so there each such string gets an invisible word joiner (U+2060) after its first character, and is text to
                whoever tokenizes the result. False lets messages write control tokens, such as the masks of an infill;
                a template that itself joins strings of messages into a control token is not seen.
            return_assistant_tokens_mask: Works although this is no Rust tokenizer.

        Raises:
            ValueError: `conversation` is not one of messages with a role and texts, or a text cannot be sanitized.
        """
        for name, value in (("sanitize_control_tokens", sanitize_control_tokens), ("tokenize", tokenize)):
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` is {value!r}; give True or False.")
        conversation, documents = as_plain(conversation), as_plain(documents)
        tools = schemas_of(tools)
        check_conversations(conversation)
        mark = None
        if sanitize_control_tokens:
            given = (conversation, tools, documents, {name: as_plain(value) for name, value in kwargs.items()})
            template = str(self.chat_template if chat_template is None else chat_template)
            control = self._control_tokens(template)
            texts = list(strings_of(given))
            if any(map(control.search, texts)):
                change = self._defused
                if tokenize:
                    mark = ChatMark.unused([template, *self._added_tokens_encoder, *texts])
                    change = mark.put
                conversation, tools, documents, kwargs = (
                    rewrite_strings(value, lambda text: change(text, control)) for value in given
                )

        tokenizer_kwargs = dict(tokenizer_kwargs or {})
        offsets_wanted = tokenizer_kwargs.get("return_offsets_mapping", False)
        if tokenize:
            if return_assistant_tokens_mask:
                tokenizer_kwargs["return_offsets_mapping"] = True  # the base class goes from characters to tokens
            if mark is not None:
                tokenizer_kwargs["chat_mark"] = mark
        result: Any = super().apply_chat_template(
            conversation,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=tokenize,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            return_dict=return_dict,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            tokenizer_kwargs=tokenizer_kwargs,
            **kwargs,
        )
        if return_assistant_tokens_mask and not offsets_wanted:
            return BatchEncoding({key: value for key, value in result.items() if key != "offset_mapping"})
        return result

    def _control_tokens(self, template: str) -> re.Pattern[str]:
        """What messages must not write: special tokens, and added tokens that a template writes, unless they are whitespace."""
        listed = template if self.chat_control_tokens is None else self.chat_control_tokens
        tokens = [
            token.content
            for token in self._added_tokens_decoder.values()
            if token.special or (token.content in listed and not token.content.isspace())
        ]
        return re.compile(any_of(tokens))

    def _defused(self, text: str, control: re.Pattern[str]) -> str:
        """`text` with no control token in it."""
        for _ in range(4):  # tokens may overlap, and breaking one may leave another
            found = control.search(text)
            if found is None:
                return text
            text = control.sub(lambda match: match[0][:1] + WORD_JOINER + match[0][1:], text)
        raise ValueError(
            f"`conversation` has a special token, {control.findall(text)[0]!r}, which is too short to be broken; pass tokenize=True, or "
            "sanitize_control_tokens=False to let it be a token."
        )


__all__ = ["SteerlingTokenizer"]
