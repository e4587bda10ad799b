"""What steerling-nano is finished on: documents that leave a topic, where its concept is pushed down."""

import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "nano"))

from concepts import CONCEPT_ID, topic_concepts
from dataset import GrammarRows
from departures import (
    LATEST_START,
    LAYER,
    LEFT,
    OTHERS,
    STRENGTHS,
    UNPUSHED,
    DepartureCollator,
    DepartureRows,
    Pushes,
    departure,
)
from lexicon import TOPICS
from steerling_hf.modeling.lookup_steerling import concept_direction
from train import ROW_LENGTH

COUNT = 40


@pytest.fixture
def rows(tokenizer) -> DepartureRows:
    return DepartureRows(tokenizer, COUNT, ROW_LENGTH, seed=0, tuning_from=0, share=0.5)


def test_a_topic_is_left_where_it_is_pushed_down():
    kinds = []
    for seed in range(200):
        opening, rest, pushed = departure(random.Random(seed))
        assert rest.text.startswith(" ")
        begun, goes_on = (
            set.intersection(*(set(chunk.concepts) for chunk in part.chunks)) for part in (opening, rest)
        )
        [topic] = [topic.name for topic in TOPICS if begun.issuperset(topic_concepts(topic.name))]
        stays = CONCEPT_ID[topic] in goes_on
        assert stays == (pushed != topic)
        assert stays or not any(CONCEPT_ID[topic] in chunk.concepts for chunk in rest.chunks)
        kinds.append("left" if not stays else "other" if pushed else "none")
    for kind, share in (("left", LEFT), ("none", UNPUSHED), ("other", OTHERS)):
        assert abs(kinds.count(kind) / len(kinds) - share) < 0.1


def test_rows_push_and_teach_behind_openings_alone(rows, tokenizer):
    made = [rows[index] for index in range(COUNT)]
    departures = [row for row in made if "pushed" in row]
    assert 0.3 * COUNT < len(departures) < 0.7 * COUNT
    for row in departures:
        assert len(set(map(len, row.values()))) == 1
        assert ROW_LENGTH - LATEST_START <= len(row["labels"]) <= ROW_LENGTH
        for label, token, pushed in zip(row["labels"], row["input_ids"], row["pushed"]):
            assert label == token or label == pushed == -100
        assert row["labels"][0] == -100
    taught = {pushed for row in departures for label, pushed in zip(row["labels"], row["pushed"]) if label != -100}
    assert -100 in taught
    assert len(taught) > len(TOPICS) / 2
    plain = GrammarRows(tokenizer, COUNT, ROW_LENGTH, seed=0, tuning_from=0)
    assert all("pushed" in row or row == plain[index] for index, row in enumerate(made))


def test_only_noised_positions_of_pushed_rows_are_changed():
    model, length = make_model(diff_block_size=8), 20
    examples = [
        {"input_ids": list(range(5, 25)), "pushed": [-100] * 8 + [3] * 8 + [4] * 4},
        {"input_ids": list(range(5, 25))},
        {"input_ids": list(range(5, 25)), "pushed": [4] * 20},
    ]
    batch = DepartureCollator(model.config, seed=0)(examples)
    assert batch["pushed"].tolist()[1] == [-100] * length
    before, after = [], []
    block = model.transformer.blocks[LAYER - 1]
    block.register_forward_hook(lambda _module, _inputs, output: before.append(output))
    Pushes(model, seed=0)
    block.register_forward_hook(lambda _module, _inputs, output: after.append(output))
    with torch.no_grad():
        model(**batch)
        change = after[0] - before[0]
        assert change.shape[1] > length  # the clean copy
        strengths = {}
        for row, concept in ((0, 3), (0, 4), (2, 4)):
            where = torch.zeros(change.shape[:2], dtype=torch.bool)
            where[row, :length] = (batch["noise_mask"] & (batch["pushed"] == concept))[row]
            assert where.any()
            sizes = -(change[where] @ concept_direction(model, (concept,))[0])
            assert torch.allclose(sizes, sizes[:1].expand_as(sizes), rtol=1e-4)
            strengths.setdefault(row, []).append(float(sizes[0]))
            change = change.masked_fill(where[..., None], 0.0)
        assert not change.any()
        assert strengths[0][0] == pytest.approx(strengths[0][1])
        assert strengths[0][0] != pytest.approx(strengths[2][0])
        assert all(STRENGTHS[0] <= strength <= STRENGTHS[1] for own in strengths.values() for strength in own)
        del batch["pushed"]
        model(**batch)
    assert torch.equal(before[1], after[1])
