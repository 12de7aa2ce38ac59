"""sentence-transformers reads both encoders from a folder, pools their states, saves and reloads them."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer

from tests.support import drt, insnext
from tests.support.equality import within_rounding
from tests.support.tokenizers import tiny_tokenizer


pytestmark = pytest.mark.outside

MAKERS = {"insnext": insnext.shipped_model, "drt": drt.shipped_model}
TEXTS = ["the old man", "a quick brown fox jumps over the lazy dog", "sea"]


@pytest.mark.parametrize("name", MAKERS)
def test_an_encoder_is_pooled_saved_and_reloaded(name, tmp_path):
    model = MAKERS[name](vocab_size=60)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(60).save_pretrained(tmp_path / "model")
    encoder = Transformer(str(tmp_path / "model"), max_seq_length=32)
    sentences = SentenceTransformer(modules=[encoder, Pooling(32, "mean")], device="cpu")
    vectors = sentences.encode(TEXTS, convert_to_tensor=True)
    assert vectors.shape == (3, 32) and vectors.isfinite().all()
    alone = torch.stack([sentences.encode(text, convert_to_tensor=True) for text in TEXTS])
    assert within_rounding(alone, vectors)
    sentences.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert within_rounding(again, vectors)
    # control: another model's vectors are others
    MAKERS[name](vocab_size=60, seed=1).save_pretrained(tmp_path / "model")
    other = Transformer(str(tmp_path / "model"), max_seq_length=32)
    other = SentenceTransformer(modules=[other, Pooling(32, "mean")], device="cpu").encode(
        TEXTS, convert_to_tensor=True
    )
    assert not within_rounding(other, vectors)
