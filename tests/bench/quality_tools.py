"""Programs that quantize a model by one of the tools of `bench_quality`, each run in a process of its own.

Every program gets the model, the windows of token ids as JSON, the recipe's file and the output directory.
"""

from __future__ import annotations

# The model is compiled beforehand: its artifact comes first.
OURS = """
import json, sys, torch, runtime
artifact, model, windows, recipe, out = sys.argv[1:]
ids = torch.tensor(json.load(open(windows)))
runtime.calibrate(runtime.load(artifact), weights=model, recipe=runtime.Recipe.from_file(recipe),
                  batches=runtime.batches(list(ids), 8), out=out)
"""

LLM_COMPRESSOR = """
import json, sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
import llmcompressor.pipelines.cache as cache
if not torch.cuda.is_available():  # it pins memory for an accelerator that is not there
    cache.IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
from llmcompressor import oneshot
model, windows, recipe, out = sys.argv[1:]
ids = json.load(open(windows))
data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
oneshot(model=loaded, dataset=data, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False, batch_size=1)
loaded.save_pretrained(out, save_compressed=True)
"""

# It saves rounded weights in the model's dtype: its own formats are not read by every environment.
AUTO_ROUND = """
import json, sys, torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
model, windows, recipe, out = sys.argv[1:]
ids = torch.tensor(json.load(open(windows)))
bits, group_size = map(int, open(recipe).read().split())
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(model)
data = torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=8)
tool = AutoRound(loaded, tokenizer=tokenizer, bits=bits, group_size=group_size, sym=True, dataset=data,
                 nsamples=len(ids), seqlen=ids.shape[1], batch_size=8, device_map="cpu")
rounded, _ = tool.quantize()
config = rounded.config
if hasattr(config, "quantization_config"):
    del config.quantization_config
rounded.save_pretrained(out)
"""


def staged(recipe: str) -> str:
    """Put modifiers into a stage: llm-compressor ignores those outside of one."""
    lines = (f"    {line}" for line in recipe.splitlines())
    return "\n".join(("bench_stage:", "  bench_modifiers:", *lines, ""))
