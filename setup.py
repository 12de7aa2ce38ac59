import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "modeling_insnext" / "__init__.py").read_text(), re.MULTILINE)[
    1
]

PACKAGES = ["modeling_insnext", *(f"modeling_insnext.{room}" for room in ("insnext", "drt", "data", "tasks"))]
PACKAGE_DIR = {"modeling_insnext": "modeling_insnext"}
# the folder kernels/ itself is no package: one named `kernels` would shadow the library that transformers imports
if (HERE / "kernels" / "insnext_kernels").is_dir():
    PACKAGES += find_packages("kernels")
    PACKAGE_DIR["insnext_kernels"] = "kernels/insnext_kernels"

TRITON = ["triton>=3.5; platform_system == 'Linux'"]
GGUF = ["gguf>=0.17"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30"]
TRAIN = ["accelerate", "datasets", "evaluate", "matplotlib", "peft", "sacrebleu", "tqdm"]

setup(
    name="modeling-insnext",
    version=VERSION,
    description="Insertion and retrieval language models for Hugging Face Transformers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    python_requires=">=3.10",
    install_requires=[
        "huggingface_hub>=1.31",
        "numpy",
        "safetensors",
        "torch>=2.9",
        "transformers>=5.17,<6",
    ],
    extras_require={
        "train": TRAIN,
        "eval": ["lm-eval", "nltk", "rouge-score"],
        "faiss": ["faiss-cpu"],
        "gguf": GGUF,
        "serve": SERVE,
        "triton": TRITON,
        "test": [
            *TRAIN,
            *TRITON,
            *GGUF,
            *SERVE,
            "faiss-cpu",
            "hypothesis",
            "openai",
            "pytest>=9",
            "pytest-xdist",
            "rouge-score",
            "ruff",
            "vulture",
        ],
        "outside": [
            "bitsandbytes",
            "lm-eval",
            "parameterized",
            "playwright",
            "sentence-transformers",
            "torchao",
            "trl",
        ],
    },
)
