"""Adapters: what they reach, that they train, and that merging and reloading change nothing."""

import peft
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from modeling_insnext import InsNextForInsertionLM, InsNextForSequenceClassification
from modeling_insnext.data import ContextMixture, InsertionCollator
from modeling_insnext.insertion_trainer import InsertionTrainer
from tests.support.equality import same_bits, within_rounding
from tests.support.insnext import SHIPPED_VOCAB, random_ids, shipped_model
from tests.support.tokenizers import tiny_tokenizer


IDS = random_ids(2, 6)
POSITIONS = torch.tensor([[0, 4, 1, 3, 2, 5]] * 2)
LAYER = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SLOT_HEAD = {"left_proj", "right_proj", "state_proj", "query_proj", "key_proj"}
ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "all-linear dora": {"target_modules": "all-linear", "use_dora": True},
    "slot head trained": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["slot_head"]},
}


def adapted(kind, random=True):
    """Return a model in float64 with adapters, and with `random` ones that do something."""
    base = shipped_model(InsNextForInsertionLM).double()
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **ADAPTERS[kind])).double()
    if random:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def insertion_loss(model):
    return model(input_ids=IDS, positions=POSITIONS, context_length=2, labels=IDS).loss


def log_probabilities(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def difference(first, second):
    assert same_bits(first.isneginf(), second.isneginf())
    return (first - second).nan_to_num(nan=0.0).abs().max()


def adapted_layers(model):
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    return {name.split(".lora_")[0].split(".")[-1] for name in names}


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("lora", {"q_proj", "v_proj"}), ("all-linear", LAYER | SLOT_HEAD), ("slot head trained", {"q_proj", "v_proj"})],
)
def test_what_an_adapter_reaches(kind, layers):
    model = adapted(kind)
    assert adapted_layers(model) == layers
    assert model.get_base_model().lm_head.weight is model.get_base_model().model.embed_tokens.weight


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_new_adapter_changes_nothing_and_all_of_it_is_trained(kind):
    fresh, base = adapted(kind, random=False), shipped_model(InsNextForInsertionLM).double()
    assert difference(log_probabilities(fresh), log_probabilities(base)) < 1e-10
    model = adapted(kind)
    assert difference(log_probabilities(model), log_probabilities(base)) > 1e-2
    insertion_loss(model).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_weights_say_the_same(kind):
    model, tokenizer = adapted(kind), tiny_tokenizer()
    exact, loss = log_probabilities(model), insertion_loss(model)
    canvas = model.canvas(tokenizer, "the ___ man")
    options = {"max_new_tokens": 6, "ebr": True, "ebr_ratio": 0.5}
    text = model.generate(**canvas, **options)
    merged = model.merge_and_unload()
    assert type(merged) is InsNextForInsertionLM
    assert difference(log_probabilities(merged), exact) < 1e-10
    assert abs(insertion_loss(merged) - loss) < 1e-10
    assert same_bits(merged.generate(**canvas, **options), text)


@pytest.mark.parametrize("kind", ["lora", "all-linear dora", "slot head trained"])
def test_a_saved_adapter_loads(kind, tmp_path):
    shipped_model(InsNextForInsertionLM).double().save_pretrained(tmp_path / "base")
    model = adapted(kind)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    base = InsNextForInsertionLM.from_pretrained(tmp_path / "base")
    for loaded in (
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
    ):
        assert type(loaded) is peft.PeftModelForCausalLM
        assert difference(log_probabilities(loaded.eval()), log_probabilities(model)) < 1e-10
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = InsNextForInsertionLM.from_pretrained(tmp_path / "merged")
    assert same_bits(again.state_dict(), merged.state_dict())
    assert within_rounding(log_probabilities(again), log_probabilities(merged))


@pytest.mark.parametrize("kind", ["lora", "slot head trained"])
def test_an_adapted_model_writes_and_scores_as_any_other(kind):
    model, tokenizer = adapted(kind), tiny_tokenizer()
    base = model.get_base_model()
    fields = {
        "bounds": model.canvas(tokenizer, "the ___{2,3} man"),
        "batch": model.canvas(tokenizer, ["the ___ man ___", "a ___ dog"]),
        "keywords": model.canvas(tokenizer, keywords=["sea", "old man"], ordered=False),
    }
    for name, canvas in fields.items():
        out = model.generate(**canvas, max_new_tokens=5, return_dict_in_generate=True)
        expected = base.generate(**canvas, max_new_tokens=5, return_dict_in_generate=True)
        assert same_bits(out.sequences, expected.sequences), name
        given = out.insertion_steps == -1
        assert out.sequences[given].tolist() == canvas["input_ids"][canvas["attention_mask"].bool()].tolist()
    plain = model.generate(input_ids=IDS, max_new_tokens=3, left_to_right=True)
    assert same_bits(plain[:, :6], IDS)
    assert within_rounding(model.score(IDS), base.score(IDS))
    with model.disable_adapter():
        without = model.score(IDS)
    assert not within_rounding(without, model.score(IDS))
    assert without.shape == model.score(IDS).shape == (2,)


@pytest.mark.parametrize("left_to_right", [False, True])
def test_an_adapter_trains(left_to_right, tmp_path):
    rows = [{"input_ids": [1, *row]} for row in torch.randint(3, SHIPPED_VOCAB, (8, 6)).tolist()]
    if left_to_right:
        trainer_class, collate = Trainer, DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    else:
        trainer_class, collate = (
            InsertionTrainer,
            InsertionCollator(pad_token_id=0, contexts=ContextMixture(words=0.5)),
        )
    model = adapted("all-linear", random=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        learning_rate=3e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    assert end["eval_loss"] < start["eval_loss"] - 0.2
    if not left_to_right:
        assert abs(end["eval_loss"] - end["eval_position_loss"] - end["eval_token_loss"]) < 1e-4
        assert {"position_loss", "token_loss"} <= trainer.state.log_history[1].keys()
    for name, parameter in model.named_parameters():
        assert same_bits(parameter, before[name]) != parameter.requires_grad, name


def test_transformers_own_adapters(tmp_path):
    model = shipped_model(InsNextForInsertionLM)
    exact = log_probabilities(model)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    changed = log_probabilities(model)
    assert difference(changed, exact) > 1e-3
    assert model.generate(IDS, max_new_tokens=3).shape[0] == 2
    model.save_pretrained(tmp_path)
    other = shipped_model(InsNextForInsertionLM)
    other.load_adapter(str(tmp_path))
    assert difference(log_probabilities(other), changed) < 1e-5
    model.disable_adapters()
    assert difference(log_probabilities(model), exact) < 1e-5


def test_a_classifier_with_adapters_survives_saving(tmp_path):
    def base():
        return shipped_model(InsNextForSequenceClassification, num_labels=3).double()

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base(), config).eval()
    assert model(IDS, labels=torch.tensor([0, 2])).loss.requires_grad
    torch.nn.init.normal_(model.get_base_model().score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert difference(loaded(IDS).logits, model(IDS).logits) < 1e-10
    assert difference(base()(IDS).logits, model(IDS).logits) > 1e-3


def test_peft_warns_that_an_adapter_on_the_tied_token_head_cannot_be_merged():
    base = shipped_model(InsNextForInsertionLM).double()
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    exact = log_probabilities(model.eval())
    assert difference(log_probabilities(model.merge_and_unload()), exact) > 1e-3
    # untied, it can
    base = shipped_model(InsNextForInsertionLM, tie_word_embeddings=False).double()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
    exact = log_probabilities(model)
    assert difference(log_probabilities(model.merge_and_unload()), exact) < 1e-10
