"""
Index a corpus on a Milvus server with many processes: each embeds its share on its own accelerator.

    accelerate launch examples/build_trace_index.py http://host:19530 guidelabs/steerling-8b corpus/

On several machines, start it on each as `accelerate launch --multi_gpu --num_machines ...` says. MILVUS_TOKEN holds the
token. What was killed goes on where it stopped when it is started again, also with another number of processes.
"""

import argparse
import os

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

import steerling_hf  # noqa: F401  registers the Auto classes
from steerling_hf.trace_index import TraceIndex


def main() -> None:
    """Run the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("uri", help="http://host:19530; the embedded engine allows one process only")
    arguments.add_argument("model", help="checkpoint folder or Hub repository")
    arguments.add_argument("corpus", help="a .jsonl, .parquet or .txt file, or a folder of them")
    arguments.add_argument("--index", default="FLAT", help="kind of index (default: %(default)s)")
    arguments.add_argument("--chunk-tokens", type=int, default=128)
    arguments.add_argument("--batch-size", type=int, default=32)
    given = arguments.parse_args()
    state = PartialState()
    if "://" not in given.uri and state.num_processes > 1:
        arguments.error(f"uri is {given.uri}: a file has one writer; start a Milvus server, or a single process")
    dtype = torch.bfloat16 if state.device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).to(state.device).eval()
    with TraceIndex(given.uri, token=os.environ.get("MILVUS_TOKEN")) as index:
        report = index.build(
            model,
            AutoTokenizer.from_pretrained(given.model),
            given.corpus,
            chunk_tokens=given.chunk_tokens,
            index=given.index,
            batch_size=given.batch_size,
            shard=(state.process_index, state.num_processes),
            progress=state.is_main_process,
        )
    print(f"process {state.process_index}: {report}")


if __name__ == "__main__":
    main()
