"""Loads a model as a stranger would: by path or name, with its own code, where this package cannot be imported.

Run as a script it reads a JSON description of what to load, hides the package, loads, and writes what the model says
to a safetensors file. It must not import anything of this repository.
"""

import json
import sys
from importlib.abc import MetaPathFinder

import torch
import transformers


HIDDEN = ("modeling_insnext", "insnext_kernels", "conversion")
NEW_TOKENS = 8


class Hiding(MetaPathFinder):
    """Refuses to find the packages of this repository."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ImportError(f"{name} is hidden: a checkpoint must load with its own code")


@torch.no_grad()
def observe(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is compared: logits and, of a model that writes, its greedy continuation."""
    inputs = ids[:, None] if type(model).__name__.endswith("ForMultipleChoice") else ids
    out = model(inputs)
    found = {"logits": (out.logits if "logits" in out else out.last_hidden_state).contiguous()}
    if model.can_generate():
        found["tokens"] = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return found


def load(auto_class: str, model: str, adapter: str | None, revision: str | None):
    """Return the model that `model` names, under the adapter that `adapter` names."""
    options = {"trust_remote_code": True}
    loader = getattr(transformers, auto_class)
    if adapter is None:
        return loader.from_pretrained(model, revision=revision, **options).eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(loader.from_pretrained(model, **options), adapter, revision=revision).eval()


def main():
    job = json.loads(sys.argv[1])
    sys.meta_path.insert(0, Hiding())
    torch.set_num_threads(job["threads"])
    model = load(job["auto_class"], job["model"], job["adapter"], job["revision"])
    inner = model.get_base_model() if job["adapter"] else model
    if not type(inner).__module__.startswith("transformers_modules."):
        raise ImportError(f"the checkpoint's own code must run, got {type(inner).__module__}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["adapter"] or job["model"], revision=job["revision"])
    found = observe(model, torch.tensor(job["ids"]))
    found["text"] = torch.tensor(tokenizer(job["text"])["input_ids"])

    from safetensors.torch import save_file

    save_file(found, job["output"])


if __name__ == "__main__":
    main()
