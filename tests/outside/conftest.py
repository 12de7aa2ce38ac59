"""Files here need packages that `make test` does not install; a file is left out where one is absent."""

import shutil
from importlib.util import find_spec

import pytest


NEEDS = {
    "test_page.py": ("playwright",),
    "test_peft_suite.py": ("parameterized", "peft"),
    "test_quantisation.py": ("torchao", "bitsandbytes"),
    "test_sentence_transformers.py": ("sentence_transformers",),
    "test_stock_lm_eval.py": ("lm_eval",),
    "test_transformers_suite.py": ("parameterized",),
    "test_trl.py": ("trl",),
}
# of Transformers' own suite
MARKERS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")

collect_ignore = [file for file, packages in NEEDS.items() if not all(map(find_spec, packages))]
# Debian's; the package of Playwright brings none
BROWSER = shutil.which("chromium")
if BROWSER is None:
    collect_ignore.append("test_page.py")


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of Transformers' own suite")


def pytest_collection_modifyitems(items):
    """Expect a test that its class excludes to fail: one that passes is no exclusion any more, and fails the run."""
    for item in items:
        excluded = getattr(getattr(item, "cls", None), "EXCLUDED", {})
        if item.name in excluded:
            item.add_marker(pytest.mark.xfail(strict=True, reason=excluded[item.name]))
