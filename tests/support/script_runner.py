"""Run a script's `main` in a process of its own, forked from one that has imported everything, killed on demand."""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = EXAMPLES / "scripts"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.preloaded"])


def at_the_end_of(step: int, act) -> None:
    """Have `act(output_dir)` called at the end of an optimiser step, before anything is saved for it."""
    from transformers import TrainerCallback, trainer

    class Actor(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                act(args.output_dir)

    trainer.DEFAULT_CALLBACKS.append(Actor)


def kill_in_training(step: int) -> None:
    """Have this process killed at the end of an optimiser step."""
    at_the_end_of(step, lambda output_dir: os.kill(os.getpid(), signal.SIGKILL))


def copy_in_training(step: int, target: str) -> None:
    """Have the output folder copied at the end of an optimiser step: what a process killed there leaves."""
    at_the_end_of(step, lambda output_dir: shutil.copytree(output_dir, target))


def kill_in_scoring(module, step: int) -> None:
    """Have this process killed after some batches, in the middle of writing a line."""
    score, calls = module.left_to_right, []

    def scored(*args):
        calls.append(1)
        if len(calls) == step:
            output_dir = Path(sys.argv[sys.argv.index("--output_dir") + 1])
            with open(output_dir / "scores.jsonl", "a") as file:
                file.write('{"row": 0, "tok')
            os.kill(os.getpid(), signal.SIGKILL)
        return score(*args)

    module.left_to_right = scored


def enter_group(rank: int, world_size: int, port: int) -> None:
    """Set what a launcher sets for one of several processes on this machine."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _child(
    script: str, arguments: list[str], log: str, kill_at: int | None, copy_at: tuple | None, group=None
) -> None:
    sys.path.insert(0, str(SCRIPTS))
    sys.argv = [script, *arguments]
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        if group is not None:
            enter_group(*group)
        module = importlib.import_module(script)
        if kill_at is not None:
            kill_in_scoring(module, kill_at) if script == "run_scoring" else kill_in_training(kill_at)
        if copy_at is not None:
            copy_in_training(*copy_at)
        metrics = module.main(arguments)
        Path(log + ".json").write_text(json.dumps(metrics))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run(
    script: str,
    arguments: list[str],
    log: Path,
    kill_at: int | None = None,
    copy_at: tuple[int, str] | None = None,
) -> dict:
    """Return what `main` returned; with `kill_at` nothing, once the process was killed there.

    `copy_at` names a step at whose end the output folder is copied, and the copy.
    """
    child = FORKS.Process(target=_child, args=(script, arguments, str(log), kill_at, copy_at))
    child.start()
    child.join()
    if kill_at is not None:
        assert child.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
        return {}
    assert child.exitcode == 0, log.read_text()[-3000:]
    return json.loads(Path(f"{log}.json").read_text())


def run_group(script: str, arguments: list[str], log: Path, world_size: int = 2) -> list[dict]:
    """Return what `main` returned in each of the processes that run it together, joined by gloo."""
    port, logs = free_port(), [log.with_suffix(f".{rank}") for rank in range(world_size)]
    groups = [(rank, world_size, port) for rank in range(world_size)]
    children = [
        FORKS.Process(target=_child, args=(script, arguments, str(file), None, None, group))
        for file, group in zip(logs, groups, strict=True)
    ]
    for child in children:
        child.start()
    for child, file in zip(children, logs, strict=True):
        child.join()
        assert child.exitcode == 0, file.read_text()[-3000:]
    return [json.loads(Path(f"{file}.json").read_text()) for file in logs]
