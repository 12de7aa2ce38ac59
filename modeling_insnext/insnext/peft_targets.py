"""PEFT's default target modules for InsNeXt, so that an adapter's configuration need not name them.

PEFT looks them up by model type, in one table a method, after it has asked the model's configuration for its
dictionary; by then it is imported, so nothing is imported for its sake. The projections and norms carry the names of
Llama's, and so get what PEFT gives Llama; what somebody entered before stays.
"""

import re
import sys


TABLE = re.compile(r"TRANSFORMERS_MODELS_TO_\w+_(TARGET|FEEDFORWARD)_MODULES_MAPPING")


def register_adapter_targets(model_type: str) -> None:
    """Enter `model_type` in the tables of PEFT, if PEFT is imported."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if TABLE.fullmatch(name) and "llama" in table:
            table.setdefault(model_type, table["llama"])


__all__ = ["register_adapter_targets"]
