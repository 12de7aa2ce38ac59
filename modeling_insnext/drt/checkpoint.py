"""What loading checks beyond Transformers: whether the tensors are those of the model, and whose code runs."""

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import logging

from .configuration_drt import CODE_VERSION


logger = logging.get_logger(__name__)

KINDS = {"missing": "missing_keys", "unexpected": "unexpected_keys"}


class CheckedLoadingMixin:
    """Adds checks to `from_pretrained`. It stands in front of `PreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load a checkpoint as any model of Transformers; warn once if another version of this code saved it.

        Raises:
            ValueError: If a weight is infinite or no number, or the checkpoint was saved by this class and a tensor is
                missing or one too many. With `output_loading_info=True` these are reported instead, as anywhere.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        # an adapter's report is about the adapter, and another class's checkpoint lacks the head or has one too many
        own = cls.__name__ in (model.config.architectures or ()) and not model._hf_peft_config_loaded
        if own and not output_loading_info:
            _check_names(info)
        _check_finite(model)
        saved_by = model.config.code_version
        if saved_by not in (None, CODE_VERSION):
            logger.warning_once(
                f"{model.config.name_or_path or cls.__name__} was saved by version {saved_by} of this code; version "
                f"{CODE_VERSION} runs, as an imported package goes before the code inside a checkpoint. Outputs may "
                f"differ: install modeling-insnext=={saved_by}, or load with trust_remote_code=True where it is not "
                "imported."
            )
        return (model, info) if output_loading_info else model


def _check_names(info: dict) -> None:
    faults = [f"{kind} {', '.join(sorted(info[key]))}" for kind, key in KINDS.items() if info[key]]
    if faults:
        raise ValueError(f"the checkpoint must hold the tensors of the model and no others, got {'; '.join(faults)}")


def _check_finite(model) -> None:
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        for part in _plain_tensors(weight.detach()):
            if part.device.type != "meta" and part.is_floating_point() and not part.isfinite().all():
                raise ValueError(f"weights must be finite, got {int((~part.isfinite()).sum())} that are not in {name}")


def _plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensor, or what one made of others (quantised, sharded) consists of: it may not know `isfinite`."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [plain for part in parts for plain in _plain_tensors(part)]


__all__ = ["CheckedLoadingMixin"]
