"""One model and one canvas that options of `generate` are tried on, and a processor that notes what it is shown."""

import torch
from transformers import LogitsProcessor

from tests.support.generation_twins import canvas_of, writing_model
from tests.support.insnext import BOS


MODEL = writing_model(seed=0, max_position_embeddings=24)
PROMPT = torch.tensor([[BOS, 5, 9, 4]])
CANVAS = canvas_of([[(BOS, True), (5, False), (9, True), (4, True)]])


def written(out, row=0):
    return [token for token, step in zip(out.sequences[row], out.insertion_steps[row], strict=True) if step > 0]


def run(model=MODEL, **options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **options}
    return model.generate(**CANVAS, return_dict_in_generate=True, **options)


class Watch(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores
