from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("REPO_ID", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("REPO_ID", trust_remote_code=True, dtype="auto")

messages = [{"role": "user", "content": "Tell me a story about a garden."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", sanitize_control_tokens=True
)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
