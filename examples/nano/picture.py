"""
Draw how a text came about: `python examples/nano/picture.py [docs/decoding.svg]`.

Each token's shade says when it was decided, from the first step (dark) to the last (light); below each chunk stand its
strongest known concepts.
"""

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import torch

from steerling_hf import checkpoint
from steerling_hf.demo import chunk_concepts, concept_names
from steerling_hf.loading import load

MESSAGE = "Please write a few cheerful lines about music."
FIRST, LAST = (38, 70, 110), (225, 236, 244)  # shades of the first and the last step
CHARACTER, LINE, MARGIN, WIDTH = 8.4, 30, 16, 860
SHOWN = 4


def shade(share: float) -> tuple[str, str]:
    """Colours of a box and of the text on it, for a step at this share of all steps."""
    box = tuple(round(a + share * (b - a)) for a, b in zip(FIRST, LAST))
    return "#{:02x}{:02x}{:02x}".format(*box), "#ffffff" if share < 0.55 else "#1b2733"


def boxes(pieces: list[tuple[str, float]], top: float) -> Iterator[tuple[float, float, str, float]]:
    """Place tokens from left to right in lines: (x, y, text, share of the steps)."""
    x, y = float(MARGIN), top
    for text, share in pieces:
        width = max(len(text), 1) * CHARACTER
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + LINE
        yield x, y, text, share
        x += width


def draw(chunks: list[tuple[list[tuple[str, float]], str]], title: str) -> str:
    """The picture as SVG, from chunks of (token, share of the steps) and a line about each."""
    parts = []
    y = 58.0
    for pieces, concepts in chunks:
        for x, line, text, share in boxes(pieces, y):
            box, ink = shade(share)
            width = max(len(text), 1) * CHARACTER
            parts.append(f'<rect x="{x:.1f}" y="{line - 17:.1f}" width="{width:.1f}" height="24" fill="{box}"/>')
            parts.append(f'<text x="{x:.1f}" y="{line:.1f}" fill="{ink}" xml:space="preserve">{escape(text)}</text>')
            y = line
        parts.append(f'<text class="note" x="{MARGIN}" y="{y + 24:.1f}">{escape(concepts)}</text>')
        y += 24 + LINE + 6
    style = "text{font:14px ui-monospace,Menlo,Consolas,monospace}.note{font-size:12px;fill:#50616f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - 14:.0f}" role="img">'
        f"<title>{escape(title)}</title><style>{style}</style>"
        f'<rect width="100%" height="100%" fill="#ffffff"/><text class="note" x="{MARGIN}" y="26">{escape(title)}</text>'
        + "".join(parts)
        + "</svg>\n"
    )


def main() -> None:
    """Generate, decompose, draw, write."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs" / "decoding.svg")
    folder = checkpoint("steerling-nano")
    model, tokenizer = load(folder)
    names = concept_names(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": MESSAGE}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    output = model.generate(**prompt, max_new_tokens=96, return_dict_in_generate=True)
    ids, steps = output.sequences[0], output.step_map[0]
    start = prompt["input_ids"].shape[1]
    chunks, place = [], 0
    for chunk, strengths in chunk_concepts(model, ids):
        positions = range(place, place + len(chunk))
        place += len(chunk)
        pieces = [
            (tokenizer.decode(ids[i]), steps[i].item() / max(1, steps.max().item()))
            for i in positions
            if i >= start and ids[i].item() not in tokenizer.all_special_ids
        ]
        if pieces:
            strongest = list(strengths.items())[:SHOWN]
            chunks.append((pieces, ", ".join(f"{names[i]} {weight:.2f}" for i, weight in strongest)))
    title = f"“{MESSAGE}” Dark tokens were decided first, light ones last; below, the known concepts."
    partial = target.with_name(f".{target.name}.tmp")
    partial.write_text(draw(chunks, title), encoding="utf-8")
    partial.replace(target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
