"""What tests of training share: arguments for a few quiet steps on the CPU, and what came of them."""

import torch
from transformers import TrainingArguments


def arguments(folder, **options) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    return TrainingArguments(**options)


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
