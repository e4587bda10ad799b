"""
Judge whether `ConceptCatalog.contrast` finds the concept that two sets of texts differ in, for nano's topics and tones.

    python examples/nano/evaluate_contrast.py --json

For each topic and each tone, 20 chunks (one or two sentences each) that have it are contrasted with 20 that have not, all
from held-out documents, so that no sentence stands in the training text. All concepts are ranked, the discovered ones
too. One JSON object goes to stdout, progress and misses to stderr:

contrast_top3   share of topics and tones whose own concept is among the first three
n               topics and tones
"""

import argparse
import json
import random
import sys

from concepts import CONCEPT_ID, tone_concept
from evaluate import ROOT_CHECKPOINT, load
from grammar import document
from lexicon import TONES, TOPICS
from tqdm import tqdm

from steerling_hf import ConceptCatalog

SEED = 40_000
TEXTS = 20
TOP = 3


def topics_and_tones() -> list[int]:
    """Return the ids of the concepts of all topics, then of all tones."""
    return [CONCEPT_ID[topic.name] for topic in TOPICS] + [tone_concept(tone.name) for tone in TONES]


def held_out_texts(concept: int, count: int, seed: int) -> tuple[list[str], list[str]]:
    """Draw chunks of held-out plain documents, `count` that have a concept and `count` that have not."""
    rng = random.Random(seed)
    positive: list[str] = []
    negative: list[str] = []
    while len(positive) < count or len(negative) < count:
        chunk = rng.choice(document(rng, "plain", held_out=True).chunks)
        texts = positive if concept in chunk.concepts else negative
        if len(texts) < count:
            texts.append(chunk.text)
    return positive, negative


def contrast_ranks(
    model, tokenizer, catalog: ConceptCatalog, seed: int = SEED, texts: int = TEXTS
) -> dict[str, int | None]:
    """Return the place of each topic's and tone's own concept in its contrast, from 1, or None if it is not in the top 10."""
    ranks: dict[str, int | None] = {}
    for concept in tqdm(topics_and_tones(), desc="contrasting", file=sys.stderr):
        positive, negative = held_out_texts(concept, texts, seed + concept)
        found = [row.concept.id for row in catalog.contrast(model, tokenizer, positive, negative, k=10)]
        ranks[catalog[concept].name] = found.index(concept) + 1 if concept in found else None
    return ranks


def top_share(ranks: dict[str, int | None], top: int = TOP) -> float:
    """Return the share of ranks that are among the first `top`."""
    return sum(rank is not None and rank <= top for rank in ranks.values()) / len(ranks)


def main() -> None:
    """Run the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    arguments.add_argument("--model", default=str(ROOT_CHECKPOINT), metavar="FOLDER")
    arguments.add_argument("--seed", type=int, default=SEED, metavar="N", help="of the texts")
    given = arguments.parse_args()
    model, tokenizer = load(given.model)
    ranks = contrast_ranks(model, tokenizer, ConceptCatalog.for_model(model), given.seed)
    for name, rank in ranks.items():
        if rank is None or rank > TOP:
            print(f"missed: {name}, rank {rank or 'above 10'}", file=sys.stderr)
    share = top_share(ranks)
    if given.json:
        print(json.dumps({"contrast_top3": round(share, 4), "n": len(ranks)}))
    else:
        print(f"{share:.1%} of {len(ranks)} topics and tones are among the first {TOP} of their contrast")


if __name__ == "__main__":
    main()
