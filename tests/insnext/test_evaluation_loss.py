"""`eval_loss` is a mean over the tokens of the data: the same whatever the batches, rows and weights of steps."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer

from modeling_insnext import DrtConfig, DrtForCausalLM, InsNextForInsertionLM
from modeling_insnext.data import ContextMixture, InsertionCollator
from modeling_insnext.insertion_trainer import InsertionTrainer
from modeling_insnext.trainers import TokenMeanTrainer
from tests.support.insnext import SHIPPED_VOCAB, shipped_model
from tests.support.quiet_training import arguments


def texts(count=7):
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + 5 * (i % 4) for i in range(count)]
    made = [{"input_ids": [1, *torch.randint(3, SHIPPED_VOCAB, (n,), generator=generator).tolist()]} for n in lengths]
    # nothing is written here: stopping is all there is to learn
    return [*made, {"input_ids": [1]}]


def collator(**options):
    contexts = ContextMixture(words=0.5, reencode=0.5)
    return InsertionCollator(pad_token_id=0, bos_token_id=1, eos_token_id=2, contexts=contexts, **options)


def nats_per_token(model, rows, weight_by_tokens=True):
    """Position + token loss of each text alone, summed; per token, or the mean of the texts' means."""
    sums, counts = [], []
    for row in rows:
        batch = collator()([row])
        with torch.no_grad():
            out = model(**batch)
        counts.append(int((batch["labels"] != -100).sum()))
        sums.append(float(out.position_loss + out.token_loss) * max(counts[-1], 1))
    if not weight_by_tokens:
        return sum(s / max(n, 1) for s, n in zip(sums, counts, strict=True)) / len(rows)
    return sum(sums) / sum(counts)


@pytest.mark.parametrize(
    "options", [{}, {"context_step_weight": 3.0}, {"pack_to": 40}], ids=["plain", "weighted", "packed"]
)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_of_insertions_is_per_token(tmp_path, batch_size, options):
    model, rows = shipped_model(InsNextForInsertionLM).double().eval(), texts()
    args = arguments(tmp_path, per_device_eval_batch_size=batch_size)
    trainer = InsertionTrainer(model, args, data_collator=collator(**options), eval_dataset=rows)
    metrics = trainer.evaluate()
    expected = nats_per_token(model, rows)
    assert abs(metrics["eval_loss"] - expected) < 1e-9
    assert abs(metrics["eval_position_loss"] + metrics["eval_token_loss"] - expected) < 1e-9
    # control: the mean of means is another number
    assert abs(nats_per_token(model, rows, weight_by_tokens=False) - expected) > 1e-2


def test_the_training_loss_weighs_its_steps(tmp_path):
    """Control: where the weights of steps reach a loss, it is another."""

    def first_loss(**options):
        args = arguments(tmp_path, per_device_train_batch_size=8)
        trainer = InsertionTrainer(
            shipped_model(InsNextForInsertionLM), args, data_collator=collator(**options), train_dataset=texts()
        )
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert first_loss(context_step_weight=3.0) > first_loss() + 0.1


def left_to_right_model(name):
    if name == "insnext":
        return shipped_model(InsNextForInsertionLM).double().eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.2}
    shape = {"num_lower_layers": 1, "retrieval_groups": [1], "chunk_size": 4, "sliding_window": 8}
    return DrtForCausalLM(DrtConfig(**sizes, **shape, vocab_size=SHIPPED_VOCAB)).double().eval()


class Padded(DataCollatorForSeq2Seq):
    """Pads ids and labels on the right; it needs no tokenizer for that."""

    def __init__(self):
        pass

    def __call__(self, features):
        width = max(len(row["input_ids"]) for row in features)
        made = {}
        for name, pad in (("input_ids", 0), ("labels", -100)):
            made[name] = torch.tensor([row[name] + [pad] * (width - len(row[name])) for row in features])
        made["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in features]
        )
        return made


@pytest.mark.parametrize("name", ["insnext", "drt"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_of_labels_is_per_token(tmp_path, name, batch_size):
    model = left_to_right_model(name)
    rows = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in texts()[:-1]]
    nats = count = 0
    with torch.no_grad():
        for row in rows:
            tokens = len(row["labels"]) - 1
            nats += tokens * float(model(**Padded()([row])).loss)
            count += tokens
    args = arguments(tmp_path, per_device_eval_batch_size=batch_size)
    classes = [TokenMeanTrainer, *([InsertionTrainer] if name == "insnext" else [])]
    for trainer_class in classes:
        trainer = trainer_class(model, args, data_collator=Padded(), eval_dataset=rows)
        assert abs(trainer.evaluate()["eval_loss"] - nats / count) < 1e-9
        assert abs(trainer.predict(rows).metrics["test_loss"] - nats / count) < 1e-9
    # control: that of `Trainer` depends on the batches
    plain = Trainer(model, args, data_collator=Padded(), eval_dataset=rows).evaluate()["eval_loss"]
    assert (abs(plain - nats / count) > 1e-4) == (batch_size < len(rows))


def test_data_without_a_token_has_no_loss(tmp_path):
    model = shipped_model(InsNextForInsertionLM)
    trainer = InsertionTrainer(model, arguments(tmp_path), data_collator=collator(), eval_dataset=[{"input_ids": [1]}])
    assert "eval_position_loss" not in trainer.evaluate()
