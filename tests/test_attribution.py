"""Concepts behind decided tokens: each piece against a forward pass over the canvas as it was, and how they add up."""

import pytest
import torch
from generation_model import MASK, PAD, make_model, make_prompt
from steerling_hf.modeling import attribution_steerling
from steerling_hf.modeling.steering_steerling import Amplify, Imitate, SetConcepts, Suppress, SuppressTokens
from steerling_hf.modeling.unmasking_steerling import UNMASKING_RULES
from transformers import LogitsProcessor, StoppingCriteriaList

from steerling_hf import SteerlingForDiffusionLM

TOLERANCE = 1e-4
HEADS = ("known", "unknown")
PARTS = ("indices", "weights", "contributions")
SPARSE = {"topk_known": 5, "topk_known_features": 5, "unknown_topk": 7}
WAYS = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "aligned": {"align_blocks": True},
}


@pytest.fixture
def model():
    return make_model(**SPARSE)


def attributed(model, prompt, **settings):
    settings = {"max_new_tokens": 12, "output_attributions": True, "return_dict_in_generate": True, **settings}
    return model.generate(prompt, **settings)


def ragged() -> dict[str, torch.Tensor]:
    """Prompts of 11, 4 and 9 tokens with their padding."""
    ids = make_prompt(11, rows=3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 2)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return {"inputs": ids, "attention_mask": mask}


@torch.no_grad()
def pieces(model, trace) -> dict[str, torch.Tensor]:
    """
    What the logit of each of n decided tokens is made of, by a forward pass over the whole canvas as it was: `logits` and
    `residual` (n,), and by lanes with their shares the concepts, indices, weights and contributions (n, k).
    """
    positions, guidance = trace.decided, trace.guidance_scale
    canvases = [trace.before(position) for position in positions.tolist()]
    seen, given = torch.stack([canvas.tokens for canvas in canvases]), canvases[0].given
    lanes = [(seen, 1.0)]
    if guidance is not None:
        lanes = [(seen, guidance), (seen.masked_fill(given, MASK), 1 - guidance)]
    tokens, rows = trace.tokens[positions], torch.arange(len(positions))
    directions = model.transformer.lm_head.weight[tokens]
    found = {"logits": torch.zeros(len(tokens)), "residual": torch.zeros(len(tokens))}
    for ids, share in lanes:
        output = model(ids, output_concepts=True)
        concepts = {name: values[rows, positions] for name, values in output.concepts.items()}
        logits = output.logits[rows, positions, tokens]
        by_heads = (concepts["composed"] * directions).sum(-1)
        found["logits"] += share * logits
        # Behind the plus, what hooks on lm_head make of the logits.
        found["residual"] += share * ((concepts["epsilon"] * directions).sum(-1) + (logits - by_heads))
        for name, head in (("known", model.known_head), ("unknown", model.unknown_head)):
            if head is None:
                continue
            indices, weights = concepts[f"{name}_indices"], share * concepts[f"{name}_weights"]
            products = torch.einsum("nkd,nd->nk", head.embeddings(indices), directions)
            for part, values in zip(PARTS, (indices, weights, weights * products)):
                before = found.get(f"{name}_{part}", values[:, :0])
                found[f"{name}_{part}"] = torch.cat([before, values], dim=-1)
    return found


def by_concept(found, name: str, part: str) -> torch.Tensor:
    """(n, concepts) sums, so that nothing hangs on the order of equals."""
    indices, values = found[f"{name}_indices"], found[f"{name}_{part}"]
    return values.new_zeros(len(indices), 60).scatter_add(-1, indices, values)


def of_row(output, row: int) -> dict[str, torch.Tensor]:
    """The attributions of a row's decided tokens."""
    trace = output.traces[row]
    width = output.attributions.logits.shape[1] - max(t.length - t.prompt_length for t in output.traces)
    columns = trace.decided + width - trace.prompt_length
    assert torch.equal(output.sequences[row, columns], trace.tokens[trace.decided])
    return {name: values[row, columns] for name, values in output.attributions.items()}


def assert_sums(output) -> None:
    """At every decided token the pieces are the logit; elsewhere there is nothing."""
    found = output.attributions
    total = found.residual + found.known_contributions.sum(-1)
    if found.unknown_contributions is not None:
        total = total + found.unknown_contributions.sum(-1)
    assert (total - found.logits).abs().max() < TOLERANCE
    decided = output.step_map >= 0
    assert decided.any()
    assert (found.logits[decided] != 0).all()
    for name, values in found.items():
        assert not values[~decided].any(), name


def assert_pieces(model, output, residual: bool = True) -> None:
    """That each row's attributions are those of `pieces`; and that they add up."""
    assert_sums(output)
    for row, trace in enumerate(output.traces):
        ours, expected = of_row(output, row), pieces(model, trace)
        scale = max(1.0, float(expected["logits"].abs().max()))
        assert (ours["logits"] - expected["logits"]).abs().max() < TOLERANCE * scale
        for name in HEADS:
            assert (f"{name}_indices" in ours) == (f"{name}_indices" in expected)
            if f"{name}_indices" not in ours:
                continue
            assert ours[f"{name}_indices"].shape == expected[f"{name}_indices"].shape
            for part in ("weights", "contributions"):
                difference = by_concept(ours, name, part) - by_concept(expected, name, part)
                assert difference.abs().max() < TOLERANCE * scale, (row, name, part)
        if residual:
            assert (ours["residual"] - expected["residual"]).abs().max() < TOLERANCE * scale


def assert_same_without(model, output, **settings) -> None:
    """That attribution changes nothing of a generation."""
    plain = attributed(model, **{**settings, "output_attributions": False})
    assert plain.attributions is None
    assert torch.equal(plain.sequences, output.sequences)
    assert torch.equal(plain.step_map, output.step_map)


def check(model, residual: bool = True, **settings):
    """Generate, and check everything above."""
    settings = {**ragged(), **settings}
    output = attributed(model, settings.pop("inputs"), **settings)
    assert_same_without(model, output, **{"prompt": ragged()["inputs"], **settings})
    assert_pieces(model, output, residual)
    return output


@pytest.mark.parametrize("guidance", [1.0, 1.7])
@pytest.mark.parametrize("way", WAYS)
def test_pieces_are_those_of_the_canvas_as_it_was(model, way, guidance):
    output = check(model, guidance_scale=guidance, **WAYS[way])
    # The parts are such that a mistake would show.
    for part in ("known_contributions", "unknown_contributions", "residual"):
        assert output.attributions[part].abs().max() > 0.5


def test_a_guided_token_has_the_concepts_of_both_passes(model):
    output = attributed(model, make_prompt(11), guidance_scale=1.7)
    ours, expected = of_row(output, 0), pieces(model, output.traces[0])
    for name, k in (("known", 5), ("unknown", 7)):
        assert ours[f"{name}_indices"].shape[-1] == 2 * k
        assert (ours[f"{name}_weights"][:, :k] > 0).all()
        assert (ours[f"{name}_weights"][:, k:] < 0).all()
        assert not torch.equal(ours[f"{name}_indices"][:, :k], ours[f"{name}_indices"][:, k:])
        torch.testing.assert_close(ours[f"{name}_weights"], expected[f"{name}_weights"], atol=TOLERANCE, rtol=0)


def test_concepts_come_strongest_first(model):
    found = of_row(attributed(model, make_prompt(11)), 0)
    for name in HEADS:
        weights = found[f"{name}_weights"]
        assert torch.equal(weights, weights.sort(dim=-1, descending=True).values)
        assert weights.dtype == torch.float32
        assert found[f"{name}_indices"].dtype == torch.long


def last_first(logits, count):
    return torch.arange(len(logits)).flip(0)[: count + 1]


@pytest.mark.parametrize("rule", [*UNMASKING_RULES, last_first], ids=str)
def test_every_rule(model, rule):
    output = check(model, unmasking=rule, steps=7, threshold=0.2, entropy_bound=2.0)
    assert not torch.equal(output.step_map[0, 11:], torch.arange(12))


def test_sampled_rows_of_one_prompt(model):
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 30, "seed": 3, "num_return_sequences": 2}
    output = check(model, **sampling)
    assert len(output.attributions.logits) == 6
    assert not torch.equal(output.sequences[0], output.sequences[1])


class Flip(LogitsProcessor):
    """Writes into its input, as a processor may."""

    def __call__(self, input_ids, scores):
        return scores.neg_()


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 2.0, "bad_words_ids": [[3, 4]]}, {"logits_processor": [Flip()]}], ids=str
)
def test_logits_are_those_before_processors(model, settings):
    output = check(model, **settings)
    plain = attributed(model, **{"prompt": ragged()["inputs"], "attention_mask": ragged()["attention_mask"]})
    assert not torch.equal(output.sequences, plain.sequences)


@pytest.mark.parametrize("way", ["cached", "uncached", "static"])
def test_masks_in_a_prompt_ends_and_criteria(model, way):
    """Prompts are filled in, and nothing behind the end of a row is shown."""
    prompt = make_prompt(11, rows=2)
    prompt[:, [2, 9]] = MASK
    free = attributed(model, prompt, **WAYS[way])
    assert_pieces(model, free)
    assert (free.step_map[:, [2, 9]] >= 0).all()
    end = int(free.sequences[0, 16])
    for settings in ({"eos_token_id": end}, {"stopping_criteria": StoppingCriteriaList([ends_with(end)])}):
        output = attributed(model, prompt, **settings, **WAYS[way])
        assert output.traces[0].length < 23
        assert_pieces(model, output)


def ends_with(token: int):
    return lambda ids, scores, **_: ids[:, -1] == token


# Steering

STEERING = {
    "set": SetConcepts((2, 25), 1.0),
    "scale and keep no epsilon": SetConcepts((3, 4, 33), 3.0, mode="scale", keep_epsilon=False),
    "two that follow each other": (SetConcepts(3, 0.3, mode="add"), SetConcepts((3, 31), 2.0, mode="scale")),
    "amplify": Amplify(3, 30.0, cutoff=None),
    "suppress tokens": SuppressTokens((3, 8), 2.0),
    "suppress": Suppress(3, (4, 5)),
    "imitate": Imitate((5, 6, 7), pooled=True),
    "imitate in part": Imitate((5, 6, 7), pooled=True, top_n=4, strength=0.5, keep_epsilon=True),
}


@pytest.mark.parametrize("guidance", [1.0, 1.7])
@pytest.mark.parametrize("name", STEERING)
def test_steered_pieces(model, name, guidance):
    settings = {**ragged(), "guidance_scale": guidance}
    prompt = settings.pop("inputs")
    steered = attributed(model, prompt, steering=STEERING[name], **settings)
    assert_same_without(model, steered, prompt=prompt, steering=STEERING[name], **settings)
    assert not torch.equal(steered.sequences, attributed(model, prompt, **settings).sequences)
    operations = STEERING[name] if isinstance(STEERING[name], tuple) else (STEERING[name],)
    with model.steer(*operations):
        assert_pieces(model, steered)
        attached = attributed(model, prompt, **settings)
    for part in attached.attributions:
        assert torch.equal(attached.attributions[part], steered.attributions[part])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"topk_known": 9, "topk_known_features": 4},
        {"topk_known": 3, "topk_known_features": 9},
        {"apply_topk_to_unknown": False},
    ],
    ids=str,
)
def test_a_changed_weight_counts_as_it_was_changed(changes):
    model = make_model(**{**SPARSE, **changes})
    output = attributed(model, make_prompt(11), steering=SetConcepts((2, 25), 1.5))
    assert_sums(output)
    found = of_row(output, 0)
    directions = model.transformer.lm_head.weight[output.sequences[0, 11:]]
    for name, concept, head in (("known", 2, model.known_head), ("unknown", 5, model.unknown_head)):
        assert (by_concept(found, name, "weights")[:, concept] == 1.5).all()
        expected = 1.5 * directions @ head.embeddings(torch.tensor(concept))
        contributions = by_concept(found, name, "contributions")[:, concept]
        torch.testing.assert_close(contributions, expected, atol=TOLERANCE, rtol=1e-5)


def test_an_imitation_shows_the_targets_concepts(model):
    target = Imitate((5, 6, 7, 8))
    output = attributed(model, make_prompt(11), steering=target)
    assert_sums(output)
    imitated = output.attributions.known_weights[0, 11:15].gt(0).sum(-1)
    free = output.attributions.known_weights[0, 15:].gt(0).sum(-1)
    assert (imitated == 5).all()
    assert (free == 5).all()
    # Without epsilon, all that is left of the logit is what concepts outside the top k say; there are none in a profile.
    assert output.attributions.residual[0, 11:15].abs().max() < TOLERANCE
    assert output.attributions.residual[0, 15:].abs().min() > TOLERANCE


def test_rows_with_steering_of_their_own_equal_their_single_runs(model):
    settings = ragged()
    steering = [None, SetConcepts((2, 25), 1.0), (SuppressTokens(3), Imitate((5, 6, 7)))]
    together = attributed(model, settings["inputs"], attention_mask=settings["attention_mask"], steering=steering)
    for row, operations in enumerate(steering):
        prompt = settings["inputs"][row : row + 1, settings["attention_mask"][row].bool()]
        alone = attributed(model, prompt, steering=operations)
        assert_sums(alone)
        ours, expected = of_row(together, row), of_row(alone, 0)
        for name in ("logits", "residual"):
            torch.testing.assert_close(ours[name], expected[name], atol=TOLERANCE, rtol=1e-5)
        for name in HEADS:
            for part in ("weights", "contributions"):
                one, other = by_concept(ours, name, part), by_concept(expected, name, part)
                torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=1e-5)


# Users' own hooks


def halve(module, args, output):
    output.features, output.weights = output.features / 2, output.weights / 2
    return output


@pytest.mark.parametrize("guidance", [1.0, 1.7])
@pytest.mark.parametrize("head", ["known_head", "unknown_head"])
def test_a_hook_on_a_head(model, head, guidance):
    plain = attributed(model, make_prompt(11), guidance_scale=guidance)
    getattr(model, head).register_forward_hook(halve)
    output = check(model, guidance_scale=guidance)
    assert not torch.equal(output.sequences[0], plain.sequences[0])
    weights = output.attributions[f"{head[:-5]}_weights"]
    assert weights.abs().max() <= 0.5 * max(guidance, 1)


def test_a_hook_on_the_residual(model):
    model.residual.register_forward_hook(lambda module, args, epsilon: 0 * epsilon)
    output = check(model)
    assert output.attributions.residual.abs().max() < TOLERANCE


def test_a_hook_on_the_logits_goes_to_the_residual(model):
    plain = attributed(model, make_prompt(11))
    model.transformer.lm_head.register_forward_hook(lambda module, args, logits: logits + 3)
    output = check(model)
    torch.testing.assert_close(output.attributions.known_weights[0], plain.attributions.known_weights[0])
    torch.testing.assert_close(output.attributions.residual[0, 11:], plain.attributions.residual[0, 11:] + 3)


# Variants of models


def test_without_a_discovered_head():
    output = check(make_model(use_unknown=False, **SPARSE))
    assert output.attributions.unknown_indices is None
    assert output.attributions.unknown_contributions is None
    guided = check(make_model(use_unknown=False, **SPARSE), guidance_scale=1.7)
    assert guided.attributions.unknown_weights is None


def test_without_epsilon_concepts_are_everything():
    output = check(make_model(use_epsilon_correction=False, **SPARSE))
    assert output.attributions.residual.abs().max() < TOLERANCE


VARIANTS = {
    "dense": {"factorize_unknown": False},
    "attention": {"use_attention_known": True, "use_attention_unknown": True},
    "attention, dense": {"use_attention_unknown": True, "factorize_unknown": False, "topk_on_logits": True},
    "more k than concepts": {"topk_known": 64, "topk_known_features": 64, "unknown_topk": 64},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    check(make_model(**{**SPARSE, **VARIANTS[name]}))


PARTLY_REPORTED = {
    "all discovered concepts, dense": ({"apply_topk_to_unknown": False, "factorize_unknown": False}, 64),
    "all discovered concepts, factorised": ({"apply_topk_to_unknown": False, "n_unknown_concepts": 59}, 64),
    "more than are reported": ({"topk_known": 3, "topk_known_features": 9}, 3),
    "fewer than are reported": ({"topk_known": 9, "topk_known_features": 4}, 4),
}


@pytest.mark.parametrize("name", PARTLY_REPORTED)
def test_what_is_reported_is_not_what_counts(name):
    """Concepts that count and are not shown are part of the residual; shown ones that do not count contribute nothing."""
    changes, counting = PARTLY_REPORTED[name]
    model = make_model(**{**SPARSE, **changes})
    output = attributed(model, make_prompt(11))
    assert_sums(output)
    trace, found = output.traces[0], of_row(output, 0)
    directions = model.transformer.lm_head.weight[trace.tokens[trace.decided]]
    expected = pieces(model, trace)
    for head in HEADS:
        k = min(counting, expected[f"{head}_weights"].shape[-1]) if head == changed_head(changes) else None
        weights = torch.zeros_like(expected[f"{head}_weights"])
        weights[:, :k] = expected[f"{head}_weights"][:, :k]
        torch.testing.assert_close(found[f"{head}_weights"], weights, atol=TOLERANCE, rtol=0)
        products = torch.einsum(
            "nkd,nd->nk", getattr(model, f"{head}_head").embeddings(found[f"{head}_indices"]), directions
        )
        torch.testing.assert_close(found[f"{head}_contributions"], weights * products, atol=TOLERANCE, rtol=1e-4)


def changed_head(changes: dict) -> str:
    return "known" if "topk_known" in changes else "unknown"


def test_half_precision_adds_up_too(model):
    model.to(torch.bfloat16)
    for guidance in (1.0, 1.7):
        output = attributed(model, make_prompt(11), guidance_scale=guidance)
        assert_sums(output)
        assert output.attributions.known_contributions.dtype == torch.float32


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_it_does_not_matter_how_many_are_decomposed_together(model, guidance, monkeypatch):
    settings = {**ragged(), "guidance_scale": guidance, "steps": 8}
    prompt = settings.pop("inputs")
    expected = attributed(model, prompt, **settings)
    for together in (1, 7):
        monkeypatch.setattr(attribution_steerling, "TOGETHER", together)
        found = attributed(model, prompt, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        for name, values in found.attributions.items():
            torch.testing.assert_close(values, expected.attributions[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("on_disk", ["transformer", "heads"])
def test_offloaded_weights(on_disk, tmp_path, library_warnings):
    whole = make_model(use_attention_known=True, **SPARSE)
    whole.save_pretrained(tmp_path / "model")
    device_map = dict.fromkeys(("transformer", "known_head", "unknown_head", "residual"), "cpu")
    chosen = ("transformer",) if on_disk == "transformer" else ("known_head", "unknown_head")
    loaded = SteerlingForDiffusionLM.from_pretrained(
        tmp_path / "model", device_map=device_map | dict.fromkeys(chosen, "disk"), offload_folder=tmp_path / "offload"
    )
    library_warnings.clear()
    assert loaded.transformer.lm_head.weight.is_meta == (on_disk == "transformer")
    settings = ragged()
    prompt = settings.pop("inputs")
    for steering, guidance in ((None, 1.7), (SetConcepts((2, 25), 1.0), 1.0), (SuppressTokens(3), 1.7)):
        chosen = {**settings, "steering": steering, "guidance_scale": guidance}
        expected, found = attributed(whole, prompt, **chosen), attributed(loaded, prompt, **chosen)
        assert torch.equal(found.sequences, expected.sequences)
        for name, values in found.attributions.items():
            torch.testing.assert_close(values, expected.attributions[name])


# What it refuses


def test_models_without_concepts():
    model = make_model(interpretable=False)
    with pytest.raises(ValueError, match="output_attributions.*no concept heads"):
        attributed(model, make_prompt(11))
    assert attributed(model, make_prompt(11), output_attributions=False).attributions is None


def test_attributions_need_an_output_to_be_in(model):
    def refuse(*_):
        raise AssertionError("a forward pass came before the error")

    model.transformer.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match="output_attributions.*return_dict_in_generate"):
        model.generate(make_prompt(11), max_new_tokens=4, output_attributions=True)
    with pytest.raises(ValueError, match="output_attributions.*return_dict_in_generate"):
        attributed(model, make_prompt(11), return_dict_in_generate=False)


def test_no_attributions_unless_asked_for(model):
    output = model.generate(make_prompt(11), max_new_tokens=4, return_dict_in_generate=True)
    assert output.attributions is None
    assert len(output.traces) == 1
