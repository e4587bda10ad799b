"""
Throughput of SteerlingTokenizer beside raw tiktoken, which does the same work without transformers around it.

    python benchmarks/tokenization.py [--repeat 15] [--json]

Both take turns in each repetition, so that a busy machine slows both down; the figures are medians over repetitions, the
share is the median of the repetitions' own shares. Texts are English, German, Japanese, code and numbers without special
strings, but for the rows "with specials".
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable

import tiktoken
from timing import seconds

from steerling_hf import SteerlingTokenizer

PARAGRAPHS = [
    "The harbour was quiet that morning, and the boats lay so still that their names could be read in the water. ",
    "She wouldn't say who had written the letter; it wasn't signed, and the stamp told nothing either.\n\n",
    "Für die Überfahrt brauchte man früher drei Tage, heute nur noch vier Stunden und zwanzig Minuten. ",
    "今日は朝から雨が降っていたので、駅までバスに乗って行きました。",
    "def area(width: float, height: float) -> float:\n    return width * height  # square metres\n\n",
    "In 1987 it cost 1,249.50 and in 2023 already 3,874.25, an increase of 210.1 per cent. ",
]
MARKS = ["<|mask|>", "<|endofchunk|>", "<|endoftext|>"]


def make_text(rng: random.Random, size: int, marked: bool) -> str:
    """About `size` bytes of UTF-8 in random paragraphs, with a special string after each if `marked`."""
    parts: list[str] = []
    length = 0
    while length < size:
        part = rng.choice(PARAGRAPHS) + (rng.choice(MARKS) if marked else "")
        parts.append(part)
        length += len(part.encode())
    return "".join(parts)


def compare(ours: Callable[[], object], raw: Callable[[], object], work: int, repeat: int) -> dict[str, float]:
    """Megabytes a second of both, for `work` bytes a call."""
    times = max(1, round(0.02 / seconds(raw)))  # about 20 ms a measurement
    seconds(ours, times)
    pairs = [(seconds(ours, times), seconds(raw, times)) for _ in range(repeat)]
    return {
        "steerling_mb_s": work / statistics.median(mine for mine, _ in pairs) / 1e6,
        "tiktoken_mb_s": work / statistics.median(theirs for _, theirs in pairs) / 1e6,
        "share": statistics.median(theirs / mine for mine, theirs in pairs),
    }


def measure(repeat: int) -> list[dict[str, str | int | float]]:
    rng = random.Random(0)
    tokenizer = SteerlingTokenizer()
    vocabulary = tokenizer._vocabulary
    raw: tiktoken.Encoding = vocabulary.encoding
    rows: list[dict[str, str | int | float]] = []

    def add(task: str, size: int, batch: int, ours: Callable[[], object], other: Callable[[], object]) -> None:
        rows.append({"task": task, "bytes": size, "batch": batch, **compare(ours, other, size * batch, repeat)})

    for size in (100, 1_000, 10_000):
        text = make_text(rng, size, marked=False)
        marked = make_text(rng, size, marked=True)
        ids = raw.encode_ordinary(text)
        add("encode", size, 1, lambda text=text: tokenizer(text), lambda text=text: raw.encode_ordinary(text))
        add(
            "encode, with specials",
            size,
            1,
            lambda text=marked: tokenizer(text),
            lambda text=marked: raw.encode(text, allowed_special="all"),
        )
        add("decode", size, 1, lambda ids=ids: tokenizer.decode(ids), lambda ids=ids: raw.decode(ids))
    for size, batch in ((100, 64), (1_000, 8), (1_000, 128), (10_000, 32)):
        texts = [make_text(rng, size, marked=False) for _ in range(batch)]
        add("encode", size, batch, lambda t=texts: tokenizer(t), lambda t=texts: raw.encode_ordinary_batch(t))
        batch_ids = raw.encode_ordinary_batch(texts)
        add(
            "decode",
            size,
            batch,
            lambda i=batch_ids: tokenizer.batch_decode(i),
            lambda i=batch_ids: raw.decode_batch(i),
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15, help="measurements of each row")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error(f"--repeat is {options.repeat}; give at least 1")
    rows = measure(options.repeat)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'task':24}{'bytes':>7}{'batch':>7}{'ours MB/s':>11}{'tiktoken':>10}{'share':>8}")
    for row in rows:
        print(
            f"{row['task']:24}{row['bytes']:7,}{row['batch']:7}{row['steerling_mb_s']:11.2f}{row['tiktoken_mb_s']:10.2f}"
            f"{row['share']:8.0%}"
        )


if __name__ == "__main__":
    main()
