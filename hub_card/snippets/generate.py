from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("REPO_ID", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("REPO_ID", trust_remote_code=True, dtype="auto")

inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
