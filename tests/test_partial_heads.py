"""A head that is asked for some of its concepts alone: the same weights, without scoring all the others."""

import pytest
import torch
from generation_model import MASK, make_model
from steerling_hf.modeling import concepts_steerling, modeling_steerling
from steerling_hf.modeling.concepts_steerling import SteerlingConceptHead, SteerlingPartialOutput, weights_among

from steerling_hf import SetConcepts

CONCEPTS, ROWS, WIDTH = 1000, 40, 32
MASKS = torch.full((1, 5), MASK)
KINDS = {
    "linear": {},
    "attention": {"use_attention": True},
    "factorized": {"factorized": True},
    "all concepts": {"topk": None, "topk_features": None},
    "more features than reported": {"topk_features": 9},
    "fewer features than reported": {"topk_features": 2},
}


def make_head(**overrides) -> SteerlingConceptHead:
    config = make_model().config
    torch.manual_seed(0)
    options = {"topk": 4, "topk_features": None, "use_attention": False, "factorized": False, **overrides}
    head = SteerlingConceptHead(config, CONCEPTS, **options)
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return head


def hidden_states() -> torch.Tensor:
    return torch.randn(2, ROWS // 2, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[((12,), 1), ((12,), 16), ((2, 12), 1)], ids=["many groups", "too few groups", "two samples"])
def scored(monkeypatch, request) -> list[int]:
    """Rows of which all concepts were scored, pass by pass; a sample is a twentieth of the concepts."""
    rows: list[int] = []
    strongest = SteerlingConceptHead._strongest

    def watched(self, keys, query):
        rows.append(len(query))
        return strongest(self, keys, query)

    screens, group = request.param
    monkeypatch.setattr(SteerlingConceptHead, "_strongest", watched)
    monkeypatch.setattr(concepts_steerling, "SCREENS", screens)
    monkeypatch.setattr(concepts_steerling, "GROUP", group)
    return rows


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_weights_and_features_are_those_of_the_whole(scored, kind):
    head, hidden = make_head(**KINDS[kind]), hidden_states()
    whole = head(hidden)
    often = int(whole.indices.flatten().bincount().argmax())
    only = torch.tensor([often, 17, int(whole.indices[1, 3, 0])])
    flat = (part.flatten(0, 1) for part in (hidden, whole.indices, whole.weights))
    expected = head.weights_of(*flat, only).view(2, ROWS // 2, 3)
    assert (expected != 0).any(dim=1).any(dim=0)[[0, 2]].all()
    found = head(hidden, only=only)
    assert isinstance(found, SteerlingPartialOutput)
    assert torch.equal(found.indices, only.expand(2, ROWS // 2, 3))
    torch.testing.assert_close(found.weights, expected)
    torch.testing.assert_close(found.features, expected @ head.embeddings(only), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_few_rows_are_scored_as_a_whole(scored):
    head, hidden = make_head(), hidden_states()
    present = (head(hidden).indices == 17).any(dim=-1).sum()
    scored.clear()
    head(hidden, only=torch.tensor([17]))
    assert present <= sum(scored) <= present + ROWS // 4


@torch.no_grad()
def test_a_concept_as_strong_as_the_last_of_the_top_k_is_looked_at(scored):
    """All are alike: what a sample says does not rule anything out."""
    head, hidden = make_head(), hidden_states()
    torch.nn.init.zeros_(head.concept_predictor.weight)
    head(hidden, only=torch.tensor([17]))
    assert scored == [ROWS]


@torch.no_grad()
def test_beyond_the_bound_nothing_is_ruled_out(scored):
    """Where logits are clamped all are alike, whatever they were before."""
    head, hidden = make_head(), hidden_states()
    bias = torch.nn.functional.normalize(torch.ones(WIDTH), dim=0)
    head.concept_predictor.weight.add_(100 * bias)
    found = head(hidden.abs(), only=torch.tensor([17]))
    assert scored == [ROWS]
    whole = head(hidden.abs())
    assert torch.equal(found.weights[..., 0] > 0, (whole.indices == 17).any(dim=-1))


@torch.no_grad()
def test_no_row_is_scored_if_none_needs_it(scored):
    head = make_head()
    query = hidden_states()[:, :1]
    weakest = int(head.logits(query[0]).argmin())
    assert not head(query[:1], only=torch.tensor([weakest])).weights.any()
    assert not scored


@pytest.mark.parametrize("others", ["none", "on the head", "inside it", "on the residual"])
def test_hooks_that_may_look_at_everything_are_given_everything(others, monkeypatch):
    model, asked = make_model(topk_known=5, topk_known_features=5, unknown_topk=7), []
    forward = SteerlingConceptHead.forward

    def watched(self, hidden_states, only=None):
        asked.append(only)
        return forward(self, hidden_states, only)

    monkeypatch.setattr(SteerlingConceptHead, "forward", watched)
    modules = {"on the head": model.known_head, "inside it": model.known_head._keys, "on the residual": model.residual}
    if others in modules:
        modules[others].register_forward_hook(lambda *_: None)
    with model.steer(SetConcepts((3, 1), 1.0)):
        with torch.no_grad():
            model(MASKS)
        first = asked[0]
        assert first.tolist() == [1, 3] if others == "none" else first is None
        asked.clear()
        model(MASKS)
        assert asked[0] is None  # gradients are those of the whole


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_no_positions_at_all(kind):
    head, nothing = make_head(**KINDS[kind]), torch.zeros(0, WIDTH)
    whole, some = head(nothing), head(nothing, only=torch.tensor([3, 17]))
    assert whole.features.shape == some.features.shape == (0, WIDTH)
    assert whole.weights.shape == whole.indices.shape == (0, whole.weights.shape[-1])
    assert some.weights.shape == some.indices.shape == (0, 2)


def test_weights_among_many_and_few():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (7, 9), generator=generator)  # some are named twice
    weights = torch.rand(7, 9, generator=generator)
    for concepts in (torch.tensor([39, 3, 17]), torch.randperm(60, generator=generator), torch.tensor([50])):
        expected = (weights[..., None] * (ids[..., None] == concepts)).sum(dim=-2)
        torch.testing.assert_close(weights_among(ids, weights, concepts), expected)


@torch.no_grad()
def test_many_concepts_are_changed_as_few_are(monkeypatch):
    model = make_model()
    with model.steer(SetConcepts(tuple(range(45, 2, -3)), 0.7)):
        few = model(MASKS).logits
        monkeypatch.setattr(modeling_steerling, "FEW_CONCEPTS", 3)
        torch.testing.assert_close(model(MASKS).logits, few)
        forwards = []
        model.known_head.register_forward_pre_hook(lambda _h, _a, options: forwards.append(options), with_kwargs=True)
        model(MASKS)
    assert forwards == [{"only": None}]
