"""Virtual tokens of PEFT (prompt, prefix and P-tuning): where DRT cannot read them, they must not be ignored."""


def virtual_tokens(model) -> str | None:
    """Return the name of the method by which PEFT puts learned tokens in front of the texts of a running `generate`.

    PEFT does it by standing in for the model's `prepare_inputs_for_generation` while `generate` runs; `None` where it
    does not, or has adapters that need no tokens.
    """
    adapted = getattr(model.prepare_inputs_for_generation, "__self__", model)
    method = getattr(adapted, "active_peft_config", None)
    return method.peft_type.value if method is not None and method.is_prompt_learning else None


__all__ = ["virtual_tokens"]
