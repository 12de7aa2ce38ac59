"""Weights of other families into InsNeXt and DRT, and back; not part of the installed package.

    python -m conversion.from_llama SRC DST --to insnext|drt

One module a family, each with one table of names. `None` in a table marks a source tensor that is left out on purpose,
never one that was forgotten; what has no source is listed as new. Everything else is refused by name.
"""
