"""Imported before processes are forked to run scripts (`script_runner`): what each of them would import and set up."""

import gc
from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping


for name in ("datasets", "peft", "matplotlib.pyplot", "transformers.trainer", "modeling_insnext.insertion_trainer"):
    import_module(name)
# made at the first use, some two thousand regular expressions
get_checkpoint_conversion_mapping("llama")
# Accelerate asks for a collection after each training
gc.freeze()
