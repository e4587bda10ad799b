from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("REPO_ID", trust_remote_code=True, dtype="auto", device_map="auto")
print({parameter.device for parameter in model.parameters()})
