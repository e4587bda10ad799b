"""Operations for the tests of steering, one of every kind, and a look at all hooks of a model."""

from steerling_hf.modeling.steering_steerling import (
    Amplify,
    Condition,
    Imitate,
    Inject,
    SetConcepts,
    Suppress,
    SuppressTokens,
)

# In the model of generation_model.py, concepts 0 to 19 are known and 20 to 49 discovered.
OPERATIONS = {
    "inject": Inject(3, 30.0),
    "inject until a cutoff": Inject(3, 30.0, cutoff=9),
    "inject raw strength in a window": Inject((1, 2), -4.0, normalized=False, layers=(1,), window=(2, 11)),
    "inject a discovered concept": Inject(31, 30.0),
    "inject on a condition": Inject(3, 30.0, condition=Condition(3, 0.01)),
    "suppress tokens": SuppressTokens(3),
    "set concepts": SetConcepts((2, 25), 1.0),
    "add without epsilon in a window": SetConcepts(3, 5.0, mode="add", keep_epsilon=False, window=(0, 9)),
    "imitate": Imitate((5, 6, 7, 8)),
    "imitate a mean": Imitate((5, 6, 7), pooled=True, top_n=4, strength=0.5, keep_epsilon=True),
    "amplify": Amplify(3, cutoff=5),
    "suppress": Suppress(3, (4, 5)),
}
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooks_of(model) -> dict[tuple[str, str], list]:
    """All hooks of all modules, in order."""
    return {
        (name, kind): list(getattr(module, kind).items())
        for name, module in model.named_modules()
        for kind in HOOKS
        if getattr(module, kind)
    }
