"""What operations compute, against their formulas in float64, for every kind of concept head."""

import pytest
import torch
from generation_model import MASK, make_model, make_prompt
from steerling_hf.modeling.lookup_steerling import concept_direction, project
from steerling_hf.modeling.steering_steerling import Imitate, Inject, SetConcepts, SuppressTokens

# Which concepts of a head are reported and which form its features.
TOP_K = {"topk_known": 4, "topk_known_features": 4, "unknown_topk": 6}
HEADS = {
    "top k": TOP_K,
    "more features": {**TOP_K, "topk_known_features": 8},
    "fewer features": {**TOP_K, "topk_known": 8},
    "no top k": {"topk_known": None, "topk_known_features": None, "apply_topk_to_unknown": False},
    "attention": {**TOP_K, "use_attention_known": True, "factorize_unknown": False},
    "no epsilon": {**TOP_K, "use_epsilon_correction": False},
}
CANVAS = torch.cat([make_prompt(10), torch.full((1, 6), MASK)], dim=1)
MASKED = slice(10, 16)


def make(kind="top k", **overrides):
    return make_model(**{**HEADS[kind], **overrides})


def concepts_of(model, *operations, canvas=CANVAS):
    with torch.no_grad(), model.steer(*operations):
        return model(canvas, output_concepts=True).concepts


def tables(model, head) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings E and predictors P of all concepts of a head, float64."""
    count, double = head.n_concepts, {name: weight.detach().double() for name, weight in head.named_parameters()}
    if head.factorized:
        embeddings = double["embedding_coef.weight"] @ double["embedding_basis.weight"].T
        return embeddings[:count], (double["predictor_up.weight"] @ double["predictor_down.weight"])[:count]
    embeddings = double["concept_embedding.weight"][:count]
    if head.use_attention:
        return embeddings, embeddings @ double["concept_query_projection.weight"] * model.config.n_embd**-0.5
    return embeddings, double["concept_predictor.weight"][:count]


def weights_of(model, head, hidden: torch.Tensor) -> torch.Tensor:
    """(n, concepts) weights, float64, with which concepts enter the features; 0 for those that do not."""
    weights = (hidden.double() @ tables(model, head)[1].T).clamp(-15, 15).sigmoid()
    k = head.topk if head.topk is None else head.topk_features or head.topk
    if k is None:
        return weights
    return torch.zeros_like(weights).scatter(-1, weights.topk(k).indices, weights.topk(k).values)


def changed(weights: torch.Tensor, concepts: list[int], mode: str, value: float) -> torch.Tensor:
    weights = weights.clone()
    if concepts:
        old = weights[:, concepts]
        weights[:, concepts] = {"set": torch.full_like(old, value), "scale": old * value, "add": old + value}[mode]
    return weights


def composed_by_formula(model, operations) -> torch.Tensor:
    """(n, D) composed states of the masked positions."""
    hidden = concepts_of(model).hidden[0, MASKED].double()
    heads = (model.known_head, model.unknown_head)
    before = [weights_of(model, head, hidden) for head in heads]
    after = before
    for operation in operations:
        known = [c for c in operation.concepts if c < 20]
        discovered = [c - 20 for c in operation.concepts if c >= 20]
        after = [
            changed(weights, own, operation.mode, operation.value) for weights, own in zip(after, (known, discovered))
        ]
    embeddings = [tables(model, head)[0] for head in heads]
    features = sum(weights @ table for weights, table in zip(after, embeddings))
    if not model.config.use_epsilon_correction or not all(operation.keep_epsilon for operation in operations):
        return features
    return features + hidden - sum(weights @ table for weights, table in zip(before, embeddings))


def assert_composed(model, *operations):
    expected, plain = composed_by_formula(model, operations), concepts_of(model)
    steered = concepts_of(model, *operations)
    torch.testing.assert_close(steered.composed[0, MASKED].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(steered.composed[:, :10], plain.composed[:, :10])
    assert not torch.allclose(steered.composed[:, MASKED], plain.composed[:, MASKED], atol=1e-3)
    lm_head = model.transformer.lm_head.weight.detach().double()
    with torch.no_grad(), model.steer(*operations):
        logits = model(CANVAS).logits
    torch.testing.assert_close(logits[0, MASKED].double(), expected @ lm_head.T, rtol=1e-4, atol=1e-3)


def inside_and_outside(model) -> tuple[int, ...]:
    """A concept of each head that is strong at a masked position, and one that is weak at all of them."""
    hidden, chosen = concepts_of(model).hidden[0, MASKED], []
    for head, first in ((model.known_head, 0), (model.unknown_head, 20)):
        strength = weights_of(model, head, hidden).amax(0)
        chosen += [first + int(strength.argmax()), first + int(strength.argmin())]
    return tuple(chosen)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("mode", ["set", "scale", "add"])
@pytest.mark.parametrize("keep_epsilon", [True, False])
def test_weights_of_concepts_are_set_scaled_and_added_to(kind, mode, keep_epsilon):
    model = make(kind)
    assert_composed(model, SetConcepts(inside_and_outside(model), 2.5, mode=mode, keep_epsilon=keep_epsilon))


@pytest.mark.parametrize("kind", HEADS)
def test_a_second_operation_goes_on_from_what_the_first_has_made(kind):
    model = make(kind)
    strong, weak, strong_discovered, weak_discovered = inside_and_outside(model)
    assert_composed(
        model,
        SetConcepts((strong, weak_discovered), 2.0),
        SetConcepts((strong, weak), 0.5, mode="add"),
        SetConcepts((strong, weak, strong_discovered, weak_discovered), 3.0, mode="scale"),
    )


def test_concepts_of_the_discovered_head_alone_change_the_text():
    model = make()
    assert model.config.use_epsilon_correction
    plain = model.generate(make_prompt(9), max_new_tokens=12)
    for operation in (SetConcepts(25, 3.0), Inject(25, 30.0), SuppressTokens(25), SetConcepts(25, 3.0, mode="add")):
        assert not torch.equal(model.generate(make_prompt(9), max_new_tokens=12, steering=operation), plain)


@pytest.mark.parametrize("kind", ["top k", "attention", "no epsilon"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_reported_weights_and_embeddings_still_sum_to_the_features(kind, strength):
    model = make(kind)
    imitate, concepts = Imitate((5, 6, 7), strength=strength), inside_and_outside(model)
    change = [SetConcepts(concepts, 1.5), SetConcepts(concepts[1:3], 0.5, mode="scale")]
    for operations in ([change[0]], change, [imitate], [imitate, *change], [change[0], imitate], [imitate, imitate]):
        steered = concepts_of(model, *operations)
        for head, name in ((model.known_head, "known"), (model.unknown_head, "unknown")):
            weights, indices = steered[f"{name}_weights"], steered[f"{name}_indices"]
            features = torch.einsum("btk,btkd->btd", weights, head.embeddings(indices).detach())
            torch.testing.assert_close(steered[f"{name}_features"], features, rtol=1e-4, atol=1e-4)
        parts = steered.known_features + steered.unknown_features + steered.epsilon
        torch.testing.assert_close(steered.composed, parts)


@pytest.mark.parametrize("kind", HEADS)
def test_after_an_imitation_weights_are_what_it_has_left_of_them(kind):
    """Setting a weight to what it is changes nothing, and setting it to another value forgets the imitation."""
    model = make(kind)
    imitate, (strong, weak, *_) = Imitate((5, 6, 7), strength=0.3, keep_epsilon=True), inside_and_outside(model)
    imitated = concepts_of(model, imitate)
    scaled = concepts_of(model, imitate, SetConcepts((strong, weak), 1.0, mode="scale"))
    torch.testing.assert_close(scaled.composed, imitated.composed)
    halves = concepts_of(model, imitate, *[SetConcepts((strong, weak), 0.5, mode="scale")] * 2)
    quarter = concepts_of(model, imitate, SetConcepts((strong, weak), 0.25, mode="scale"))
    torch.testing.assert_close(halves.composed, quarter.composed)
    gone = concepts_of(model, SetConcepts((strong, weak), 0.0), imitate, SetConcepts((strong, weak), 0.0))
    torch.testing.assert_close(concepts_of(model, imitate, SetConcepts((strong, weak), 0.0)).composed, gone.composed)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("keep_epsilon", [False, True])
def test_an_imitation_takes_over_the_concepts_of_its_target(pooled, keep_epsilon):
    model = make()
    context, target, strength = (1, 2, 3), (5, 6, 7, 8), 0.4
    plain, expected = concepts_of(model), {}
    for head, name in ((model.known_head, "known"), (model.unknown_head, "unknown")):
        profile = []
        for i in range(len(target)):
            ids = torch.tensor([[*context, *target]])
            ids[0, 3 + i] = MASK
            profile.append(weights_of(model, head, concepts_of(model, canvas=ids).hidden[0, 3 + i : 4 + i]))
        profile = torch.cat(profile)
        if pooled:
            mean = profile.mean(0)
            profile = torch.zeros_like(mean).scatter(0, mean.topk(head.topk).indices, mean.topk(head.topk).values)
            profile = profile.expand(6, -1)
        own = plain[f"{name}_features"][0, MASKED].double()
        expected[name] = own.clone()
        drawn = (1 - strength) * own[: len(profile)] + strength * profile @ tables(model, head)[0]
        expected[name][: len(profile)] = drawn
    imitate = Imitate(target, context, strength=strength, pooled=pooled, keep_epsilon=keep_epsilon)
    steered = concepts_of(model, imitate)
    for name, features in expected.items():
        torch.testing.assert_close(steered[f"{name}_features"][0, MASKED].double(), features, rtol=1e-4, atol=1e-4)
    reached = 6 if pooled else len(target)
    epsilon = plain.epsilon[0, MASKED].clone()
    epsilon[:reached] *= keep_epsilon
    torch.testing.assert_close(steered.epsilon[0, MASKED], epsilon)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("layers", "last"), [((1,), False), (1, True), (2, True), (0, True), (None, True)])
def test_an_injection_adds_its_direction_behind_each_layer(normalized, layers, last):
    model, concepts, strength = make(), (3, 7, 25), 4.0
    total = tables(model, model.known_head)[0][[3, 7]].sum(0) + tables(model, model.unknown_head)[0][5]
    direction = total / total.norm()
    lm_head = model.transformer.lm_head.weight.detach().double()
    alpha = strength / (lm_head @ direction).max() if normalized else strength
    seen: dict[tuple[int, str], torch.Tensor] = {}
    with torch.no_grad(), model.steer(Inject(concepts, strength, normalized, layers)):
        for number, block in enumerate(model.transformer.blocks):
            # The first hook sees what the block computes, the second what steering has made of it.
            for name, first in (("before", True), ("after", False)):
                block.register_forward_hook(
                    lambda _m, _a, output, key=(number, name): seen.update({key: output.clone()}), prepend=first
                )
        model(CANVAS)
    for number in range(2):
        steered = number + 1 == 1 if not last else number + 1 >= (layers or (0 if layers == 0 else 1))
        added = (seen[number, "after"] - seen[number, "before"])[0].double()
        expected = torch.zeros_like(added)
        if steered:
            expected[MASKED] = alpha * direction
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4)


def test_suppressed_tokens_are_those_that_the_concepts_promote():
    model = make()
    embeddings = torch.stack([tables(model, model.known_head)[0][3], tables(model, model.unknown_head)[0][5]])
    promoted = (embeddings @ model.transformer.lm_head.weight.detach().double().T).relu().sum(0)
    with torch.no_grad():
        plain = model(CANVAS).logits
        with model.steer(SuppressTokens((25, 3), 2.0)):
            lowered = plain - model(CANVAS).logits
    torch.testing.assert_close(lowered[0, MASKED].double(), (2 * promoted).expand(6, -1), rtol=1e-4, atol=1e-4)
    assert not lowered[0, :10].any()


def test_directions_are_projected_in_full_precision_whatever_the_weights_are():
    model = make()
    model.to(torch.bfloat16)
    table = model.transformer.lm_head.weight.detach().double()
    direction, peak = concept_direction(model, (3, 25))
    total = model.known_head.embeddings(torch.tensor([3])).detach().double()[0]
    total = total + model.unknown_head.embeddings(torch.tensor([5])).detach().double()[0]
    assert direction.dtype == torch.float32
    torch.testing.assert_close(direction.double(), total / total.norm(), rtol=1e-5, atol=1e-6)
    assert peak == pytest.approx(float((table @ direction.double()).max()), rel=1e-6)
    torch.testing.assert_close(
        project(model, direction[None])[0].double(), table @ direction.double(), rtol=1e-5, atol=1e-6
    )
