"""How a pretrained model learns to use a memory: what is trained, and what a step costs."""

import re
import resource
import time

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from modeling_insnext.trainers import TokenMeanTrainer


# what `conversion.from_llama --memory` adds to a source
NEW = re.compile(r"(^|\.)(encoder|cross_attn|query_norms\.\d+)$")
TRAINED = ("all", "memory")


def freeze_source(model: PreTrainedModel, lora_r: int = 0):
    """Return the model with what retrieves trained whole, and of the source nothing, or LoRA on its linear layers.

    Args:
        model: A DRT.
        lora_r: Rank; 0 for none. With an adapter, it and what retrieves are saved together, and the source is not.

    Raises:
        ValueError: If nothing retrieves.
    """
    new = [name for name, _ in model.named_modules() if NEW.search(name)]
    if not new:
        raise ValueError(f"a memory to train needs retrieval, got retrieval_groups={model.config.retrieval_groups}")
    if lora_r:
        own = sorted({NEW.search(name)[2] for name in new})
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora_r,
            lora_alpha=2 * lora_r,
            target_modules="all-linear",
            modules_to_save=own,
            # what is trained whole needs no adapter
            exclude_modules=r".*\.(encoder|cross_attn)\..*",
        )
        return get_peft_model(model, config)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(tuple(f"{part}." for part in new)))
    return model


def peak_memory() -> float:
    """Return the most memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MeasuredTrainer(TokenMeanTrainer):
    """Trainer that writes tokens a second since the last log, and the peak of the memory, beside the loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tokens, self._since = 0, None

    def training_step(self, model, inputs, *args, **kwargs):
        self._since = self._since or time.perf_counter()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._tokens += inputs["input_ids"].numel()
        return loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._tokens:
            seconds = time.perf_counter() - self._since
            logs |= {"tokens_per_second": round(self._tokens / seconds, 1), "peak_gib": round(peak_memory(), 2)}
            self._tokens, self._since = 0, None
        super().log(logs, *args, **kwargs)
