from transformers import pipeline

generator = pipeline("text-generation", model="REPO_ID", trust_remote_code=True)
print(generator("Once upon a time", max_new_tokens=64)[0]["generated_text"])
