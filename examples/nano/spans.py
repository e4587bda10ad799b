"""Where the chunks of a document are among its tokens."""

from collections.abc import Callable

from grammar import Document


def encode_document(document: Document, encode: Callable[[str], list[int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode a document and locate its chunks.

    Chunks end in control tokens, across which no token merges, so encoding chunk by chunk gives the ids of the whole.

    Args:
        document: the document.
        encode: text -> ids, with control strings becoming their single ids and no tokens added around.

    Returns:
        ids: the tokens of `document.text`.
        spans: for each chunk the half-open range of the tokens of its text; headers and end tokens lie outside.
    """
    ids: list[int] = []
    spans = []
    for chunk in document.chunks:
        unit = encode(chunk.prefix + chunk.text + chunk.suffix)
        # the space before a chunk is part of its first word's token; a header is tokens of its own
        header = len(encode(chunk.prefix)) if chunk.prefix.strip() else 0
        spans.append((len(ids) + header, len(ids) + len(unit) - len(encode(chunk.suffix))))
        ids += unit
    return ids, spans
