"""Can an insertion model plan? Train small models on star graphs and count exact answers.

    python examples/star_graphs.py --graphs medium --order uniform --do_train --do_eval --output_dir runs/star_medium_uniform
    python examples/star_graphs.py --graphs medium --order left_to_right --do_train --do_eval --output_dir runs/star_medium_ltr

Training writes `output_dir/final`, evaluation reads it and puts its row into `--results` (JSON, with a table in markdown
beside it). The graphs and their texts: modeling_insnext/data/star_graphs.py.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser, TrainingArguments, set_seed

from modeling_insnext import InsNextConfig, InsNextForInsertionLM
from modeling_insnext.data import ContextMixture, InsertionCollator
from modeling_insnext.data.star_graphs import BOS, EOS, PAD, get_spec, star_texts
from modeling_insnext.trainer import InsertionTrainer


@dataclass
class StarArguments:
    graphs: str = field(default="medium", metadata={"help": "easy, medium or hard."})
    order: str = field(default="uniform", metadata={"help": "Insertion order: uniform or left_to_right."})
    reencode: float = field(default=0.5, metadata={"help": "Share of texts whose context is partly written text."})
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 320
    train_size: int = field(default=50_000, metadata={"help": "Graphs to train on."})
    test_size: int = field(default=1000, metadata={"help": "Graphs to test on."})


def make_model(args: StarArguments) -> InsNextForInsertionLM:
    spec = get_spec(args.graphs)
    return InsNextForInsertionLM(
        InsNextConfig(
            vocab_size=spec.vocab_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.num_attention_heads,
            intermediate_size=args.intermediate_size,
            max_position_embeddings=spec.max_tokens,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def train(args: StarArguments, training: TrainingArguments) -> None:
    model = make_model(args)
    print(f"{model.num_parameters():,} parameters")
    trainer = InsertionTrainer(
        model=model,
        args=training,
        train_dataset=star_texts(args.graphs, "train", args.train_size),
        eval_dataset=star_texts(args.graphs, "val"),
        data_collator=InsertionCollator(
            pad_token_id=PAD,
            order=args.order,
            contexts=ContextMixture(reencode=args.reencode),
            seed=training.seed,
        ),
    )
    trainer.train()
    model.save_pretrained(f"{training.output_dir}/final")


def main():
    args, training = HfArgumentParser((StarArguments, TrainingArguments)).parse_args_into_dataclasses()
    training.remove_unused_columns = False
    set_seed(training.seed)
    if training.do_train:
        train(args, training)


if __name__ == "__main__":
    main()
