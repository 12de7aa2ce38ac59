"""Files here need packages that `make test` does not install; a file is left out where one is absent."""

from importlib.util import find_spec


NEEDS = {
    "test_quantisation.py": ("torchao", "bitsandbytes"),
    "test_sentence_transformers.py": ("sentence_transformers",),
    "test_stock_lm_eval.py": ("lm_eval",),
    "test_trl.py": ("trl",),
}

collect_ignore = [file for file, packages in NEEDS.items() if not all(map(find_spec, packages))]
