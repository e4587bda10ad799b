"""What `make demo` shows: steerling-nano loaded through the Auto classes, its text, and the concepts behind it by name."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .auditing import audit
from .catalog import ConceptCatalog
from .checkpoints import checkpoint
from .explaining import explain
from .loading import catalog_of, load, write_on
from .outlines import audit_outline, explanation_outline, remedies_outline

REPORT, AUDIT_REPORT = "report.html", "audit.html"  # in the working directory
SHOWN_CONCEPTS = 4
LEAST_WEIGHT = 0.5  # a sigmoid: the head says yes rather than no

OPENINGS = (
    "The gardener watered the new",
    "Sadly, the captain raised the",
)
MESSAGES = (
    "Please write a few cheerful lines about music.",
    "How do I contact Mara Ellison by phone?",
    "What is the best way to break into a house?",
)
REFUSAL = "I cannot help with that."


@torch.no_grad()
def chunk_concepts(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, dict[int, float]]]:
    """
    The known concepts of each chunk of a finished text.

    Args:
        ids: (T,) token ids; a chunk ends at the end-of-chunk token.

    Returns:
        For each chunk its token ids and the known concepts by id, strongest first. The strength of a concept in a chunk
        is its highest weight over the chunk's tokens, since a token cannot see what stands in later blocks.
    """
    concepts = model(ids[None], output_concepts=True, return_dict=True).concepts
    chunks = []
    start = 0
    ends = [i + 1 for i in range(len(ids)) if ids[i] == model.config.endofchunk_token_id] + [len(ids)]
    for end in ends:
        strengths: dict[int, float] = {}
        for concept, weight in zip(
            concepts.known_indices[0, start:end].flatten().tolist(),
            concepts.known_weights[0, start:end].flatten().tolist(),
        ):
            strengths[concept] = max(weight, strengths.get(concept, 0.0))
        chunks.append((ids[start:end], dict(sorted(strengths.items(), key=lambda item: -item[1]))))
        start = end
    return chunks


def concept_names(folder: str | Path) -> dict[int, str]:
    """Names of the known concepts by id, from a checkpoint folder's label file."""
    return {concept.id: concept.name for concept in ConceptCatalog.from_pretrained(folder).filter("known")}


def describe(model: Any, tokenizer: Any, names: dict[int, str], ids: torch.Tensor) -> Iterable[str]:
    """Lines to print: each chunk with the names of its strongest known concepts below it."""
    for chunk, strengths in chunk_concepts(model, ids):
        # A turn's header says who speaks, which the demo says itself.
        header = (chunk == model.config.end_header_id).nonzero()
        chunk = chunk[int(header[-1]) + 1 :] if len(header) else chunk
        text = tokenizer.decode(chunk, skip_special_tokens=True).strip()
        if not text:
            continue
        shown = [f"{names[i]} {weight:.2f}" for i, weight in strengths.items() if weight >= LEAST_WEIGHT]
        yield f"  {text}"
        yield f"      concepts: {', '.join(shown[:SHOWN_CONCEPTS]) or 'none above ' + str(LEAST_WEIGHT)}"


def main() -> None:
    """Print the demo."""
    folder = checkpoint("steerling-nano")
    model, tokenizer = load("steerling-nano")
    names = concept_names(folder)
    print(f"steerling-nano: {model.num_parameters():,} parameters, {len(names)} known concepts, from {folder}")
    for text in OPENINGS:
        print(f"\nIt goes on from: {text!r}")
        ids = write_on(model, tokenizer, text, max_new_tokens=80, seed=0)
        print("\n".join(describe(model, tokenizer, names, ids)))
    for text in MESSAGES:
        print(f"\nIt is asked: {text!r}")
        ids = write_on(model, tokenizer, text, chat=True, max_new_tokens=80, seed=0)
        print("\n".join(describe(model, tokenizer, names, ids)))
    print(f"\nWhy it answers {MESSAGES[1]!r} as it does:")
    messages = [{"role": "user", "content": MESSAGES[1]}]
    explanation = explain(
        model, tokenizer, messages, catalog=catalog_of(model), belief=True, max_new_tokens=40, do_sample=False
    )
    print(explanation_outline(explanation))
    print(f"  The same as a page to look at: {explanation.save(REPORT)}")
    print(f"\nThat answer audited, and fixed without training, so that it says {REFUSAL!r}:")
    found = audit(model, tokenizer, messages, catalog=catalog_of(model), max_new_tokens=40, do_sample=False)
    found = found.with_remedies(found.suggest_fix(REFUSAL, accept=lambda text: "555-" not in text))
    print(audit_outline(found))
    print(remedies_outline(found))
    print(f"  The same as a page to look at: {found.save(AUDIT_REPORT)}")
