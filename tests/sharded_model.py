"""Two processes that share out a tiny model's weights (FSDP2) and write texts of different lengths; run by test_sharded.py."""

import sys

import torch
import torch.distributed as dist
from generation_model import make_model, make_prompt
from torch.distributed.fsdp import fully_shard

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
prompt, length = make_prompt(5 + 4 * rank), 6 + 9 * rank
expected = make_model().generate(prompt, max_new_tokens=length)

model = make_model()
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
for block in model.transformer.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
assert torch.equal(model.generate(prompt, max_new_tokens=length), expected)
assert all(isinstance(parameter, dist.tensor.DTensor) for parameter in model.parameters())

# Training goes on: a block is freed behind its pass again, and gradients are shared out.
block = model.transformer.blocks[0].attn.c_attn
held = []
model.transformer.ln_f.register_forward_hook(lambda *_: held.append(isinstance(block.weight, dist.tensor.DTensor)))
model(prompt, labels=prompt).loss.backward()
assert held == [True]
assert all(isinstance(p.grad, dist.tensor.DTensor) for p in model.parameters() if p.grad is not None)
dist.barrier()
print("same text")
dist.destroy_process_group()
