"""
Loads an exported folder as somebody would who has transformers but not this package, and generates if it has weights.

`export(..., check=True)` and the tests run this file's text in a fresh interpreter; nothing imports it. It prints one
line on success and raises otherwise.
"""

import sys

sys.modules["steerling_hf"] = None  # type: ignore[assignment]  # from here on, importing it raises ModuleNotFoundError

from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

folder = Path(sys.argv[1])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
if len(tokenizer) > config.vocab_size:
    raise ValueError(f"the tokenizer has {len(tokenizer)} ids, but the model has {config.vocab_size}")
has_weights = any(folder.glob("*.safetensors"))

for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    if has_weights:
        # The annotation of from_pretrained leaves out that with output_loading_info it returns a pair.
        model, report = auto_class.from_pretrained(  # type: ignore[misc]
            folder, trust_remote_code=True, output_loading_info=True
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[problem]:
                raise ValueError(f"{auto_class.__name__} reports {problem}: {sorted(report[problem])[:5]}")
    else:
        with torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=True)
if has_weights:
    output = model.generate(**prompt, max_new_tokens=8)
    print(f"loads through all Auto classes; it goes on: {tokenizer.decode(output[0])!r}")
else:
    print("loads through all Auto classes; it has no weights to generate with")
