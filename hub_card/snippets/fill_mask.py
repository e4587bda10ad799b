from transformers import pipeline

fill = pipeline("fill-mask", model="REPO_ID", trust_remote_code=True)
for guess in fill("The garden was full of<|mask|>."):
    print(f"{guess['score']:.3f} {guess['token_str']!r}")
