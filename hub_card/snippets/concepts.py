import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("REPO_ID", trust_remote_code=True)
model = AutoModel.from_pretrained("REPO_ID", trust_remote_code=True, dtype="auto")

inputs = tokenizer("The garden was full of roses.", return_tensors="pt")
with torch.no_grad():
    concepts = model(**inputs, output_concepts=True).concepts

# hidden = known_features + unknown_features + epsilon, each (batch, tokens, width)
for token, ids, weights in zip(inputs["input_ids"][0], concepts.known_indices[0], concepts.known_weights[0]):
    print(repr(tokenizer.decode(token)), [(i.item(), round(w.item(), 2)) for i, w in zip(ids[:3], weights)])
