"""
Judge embeddings of steerling-nano: whether texts on one topic are each other's nearest neighbours.

    python examples/nano/evaluate_embeddings.py --json

The texts are the first chunks (one or two sentences each) of held-out plain documents that have one topic, so that no
sentence stands in the training text. A text's neighbour is the other text of highest cosine. One JSON object goes to
stdout, progress to stderr: the share of texts whose neighbour is on their topic, of which 1 in 24 would be by chance,

neighbours_share_topic
    by `embed` as it comes: composed states, mean over the tokens;
neighbours_share_topic_hidden, _known, _unknown
    by the other kinds of embeddings;
neighbours_share_topic_concepts
    by `concept_vectors`.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from evaluate import ROOT_CHECKPOINT, load
from grammar import documents
from tqdm import tqdm

from steerling_hf.embeddings import KINDS, concept_vectors, embed

SEED = 60_000
TEXTS = 480


def held_out_chunks(count: int, seed: int = SEED) -> tuple[list[str], list[str]]:
    """Return first chunks of held-out plain documents on one topic each, no two alike, and their topics."""
    topics: dict[str, str] = {}
    for source in documents(seed, kind="plain", held_out=True):
        if source.topic is not None:
            topics[source.chunks[0].text] = source.topic
        if len(topics) == count:
            return list(topics), list(topics.values())
    raise AssertionError("the grammar writes without end")


def shared_by_neighbours(similarity: torch.Tensor, topics: Sequence[str]) -> float:
    """Return the share of texts whose nearest other text, by similarity (N, N), has their topic."""
    itself = torch.eye(len(topics), dtype=torch.bool)
    nearest = similarity.masked_fill(itself, float("-inf")).argmax(dim=1).tolist()
    return sum(topics[i] == topic for i, topic in zip(nearest, topics)) / len(topics)


def neighbours_share_topic(model, tokenizer, count: int = TEXTS) -> dict[str, float]:
    """Return the measures (see the top of this file) over `count` texts."""
    texts, topics = held_out_chunks(count)
    result = {}
    for kind in tqdm(sorted(KINDS), desc="embedding", file=sys.stderr):
        vectors = embed(model, tokenizer, texts, kind, normalize=True)
        name = "neighbours_share_topic" if kind == "composed" else f"neighbours_share_topic_{kind}"
        result[name] = shared_by_neighbours(vectors @ vectors.T, topics)
    concepts = concept_vectors(model, tokenizer, texts)
    result["neighbours_share_topic_concepts"] = shared_by_neighbours(concepts.similarity(concepts), topics)
    return result


def main() -> None:
    """Run the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments.add_argument("--model", default=str(ROOT_CHECKPOINT), metavar="FOLDER")
    arguments.add_argument("--texts", type=int, default=TEXTS, metavar="N")
    given = arguments.parse_args()
    if given.texts < 2:
        arguments.error(f"--texts is {given.texts}; give 2 or more")
    result = neighbours_share_topic(*load(given.model), given.texts)
    if given.json:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))
        return
    for name, value in result.items():
        print(f"{name:32} {value:.4f}")


if __name__ == "__main__":
    main()
