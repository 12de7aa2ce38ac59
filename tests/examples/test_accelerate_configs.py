"""Several processes train as one does: through gloo on a CPU, launched by accelerate, and sharded by FSDP2."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file

from tests.support.script_models import MAKERS, SHAPES, losses, row, weights, word_tokenizer
from tests.support.script_runner import EXAMPLES, FORKS, SCRIPTS, enter_group, free_port, run, run_group


# every chunk is retrieved, so that the noise on the choice, which each process draws for itself, changes nothing
SHAPES = {**SHAPES, "drt": {**SHAPES["drt"], "num_retrieved_chunks": 6}}
WRAPPED = {"insnext": {"InsNextBlock"}, "drt": {"DrtLayer", "DrtChunkEncoder"}}
TRAIN = "--do_train --max_steps 4 --logging_steps 1 --save_strategy no --learning_rate 1e-2 --use_cpu".split()
CONFIGS = sorted((EXAMPLES / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder, dice = tmp_path_factory.mktemp("accelerate"), random.Random(0)
    (folder / "train.jsonl").write_text("".join(json.dumps(row(dice)) + "\n" for _ in range(16)))
    word_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def arguments(home: Path, model_type: str, output_dir: Path, batch_size: int) -> list[str]:
    model = ["--model_type", model_type, "--config_overrides", json.dumps(SHAPES[model_type])]
    stage = ["--stage", "sentences", "--block_size", "32"] if model_type == "insnext" else ["--block_size", "24"]
    data = ["--train_file", str(home / "train.jsonl"), "--tokenizer_name", str(home / "tokenizer")]
    where = ["--output_dir", str(output_dir), "--cache_dir", str(home / "cache"), "--report_to", "none"]
    return [*model, *stage, *data, *where, *TRAIN, "--per_device_train_batch_size", str(batch_size)]


def distance(first: Path, second: Path) -> float:
    """Return the largest difference of losses and gradient norms, relative to their size."""
    pairs = zip(losses(first), losses(second), strict=True)
    return max(abs(a - b) / abs(b) for left, right in pairs for a, b in zip(left, right, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MAKERS)
def test_two_gloo_processes_train_as_one(model_type, home, tmp_path):
    run("run_pretraining", arguments(home, model_type, tmp_path / "one", 4), tmp_path / "log")
    run_group("run_pretraining", arguments(home, model_type, tmp_path / "two", 2), tmp_path / "log")
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-5
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4
    # control: two processes that see twice the batch train otherwise
    run_group("run_pretraining", arguments(home, model_type, tmp_path / "more", 4), tmp_path / "log")
    assert distance(tmp_path / "more", tmp_path / "one") > 1e-3


@pytest.mark.slow
def test_accelerate_launches_two_processes_that_train_as_one(home, tmp_path):
    run("run_pretraining", arguments(home, "insnext", tmp_path / "one", 4), tmp_path / "log")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    launch += ["--config_file", str(EXAMPLES / "accelerate" / "multi_cpu.yaml"), str(SCRIPTS / "run_pretraining.py")]
    given = arguments(home, "insnext", tmp_path / "two", 2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *given], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-5


def model_and_batch(model_type: str):
    model = MAKERS[model_type](**SHAPES[model_type], vocab_size=50).train()
    ids = torch.randint(3, 50, (4, 20), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    if model_type == "insnext":
        order = [torch.randperm(19, generator=torch.Generator().manual_seed(n)) + 1 for n in range(4)]
        batch["positions"] = torch.stack([torch.cat([torch.zeros(1, dtype=torch.long), one]) for one in order])
        batch["context_length"] = 3
    return model, batch


def take_steps(model, batch, world_size: int = 1) -> list[float]:
    """Return the losses of three steps of plain gradient descent; gradients are means over processes."""
    found, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        loss = model(**batch, num_items_in_batch=50).loss
        (loss * world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return found


def sharded(model_type: str, rank: int, port: int, result: str) -> None:
    from torch.distributed.fsdp import fully_shard

    enter_group(rank, 2, port)
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model, batch = model_and_batch(model_type)
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    half = slice(2 * rank, 2 * rank + 2)
    batch = {name: value[half] if torch.is_tensor(value) else value for name, value in batch.items()}
    found = torch.stack(take_steps(model, batch, world_size=2))
    torch.distributed.all_reduce(found)
    state = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    sizes = {name: parameter.to_local().numel() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save({"losses": found, "state": state, "sizes": sizes}, result)
    torch.distributed.barrier()
    # gloo may abort while the interpreter is taken down
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MAKERS)
def test_fsdp2_over_no_split_modules_trains_as_one_process(model_type, tmp_path):
    model, batch = model_and_batch(model_type)
    assert set(model._no_split_modules) == WRAPPED[model_type] <= {type(m).__name__ for m in model.modules()}
    expected = torch.stack(take_steps(model, batch))
    port, result = free_port(), str(tmp_path / "result.pt")
    children = [FORKS.Process(target=sharded, args=(model_type, rank, port, result)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    found = torch.load(result, weights_only=True)
    assert torch.allclose(found["losses"], expected, rtol=1e-5)
    assert expected[2] < expected[0]
    for name, parameter in model.named_parameters():
        assert torch.allclose(found["state"][name], parameter, atol=1e-5), name
        assert found["sizes"][name] <= (parameter.shape[0] + 1) // 2 * parameter[0].numel(), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == 1 and config.num_processes >= 2
    # layers to wrap are the model's own, so one file serves both architectures
    assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config
