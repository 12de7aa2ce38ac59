"""What studies of speed share: a clock of decoding steps, texts that are written in turns, and texts to write into."""

import threading
import time
from collections.abc import Callable

import numpy as np
import torch


class StepClock:
    """Notes the processor time of its thread whenever a model embeds tokens: once a step, whoever decodes.

    Processor time, so that what else runs on a machine counts little; one thread. Nothing that is measured runs
    otherwise than without it.

    Args:
        model: The model; what other threads embed with it is not noted.
        pause: Called at every note; what passes meanwhile is not counted.
    """

    def __init__(self, model, pause: Callable[[], None] = lambda: None):
        self.embeddings, self.pause = model.get_input_embeddings(), pause
        self.widths: list[int] = []
        self.spent: list[float] = []

    def __enter__(self) -> "StepClock":
        self.thread, self.since = threading.get_ident(), time.thread_time()
        self.hook = self.embeddings.register_forward_pre_hook(self._note)
        return self

    def __exit__(self, *error):
        self.hook.remove()

    def _note(self, module, args):
        if threading.get_ident() == self.thread:
            self.spent.append(time.thread_time() - self.since)
            self.widths.append(args[0].shape[1])
            self.pause()
            self.since = time.thread_time()

    @property
    def begun(self) -> int:
        """Number of steps that began so far; that of the canvas or prompt is none."""
        return len(self.widths) - 1

    def steps(self, single: bool = True) -> np.ndarray:
        """Return the seconds of the steps that embedded one token a row, or of all; neither of the first nor the last.

        Those are of a canvas or prompt and of what comes before and after.
        """
        seconds = zip(self.widths[1:-1], self.spent[2:], strict=True)
        return np.array([spent for width, spent in seconds if width == 1 or not single])


def in_turns(*jobs: tuple[object, Callable[[], object]]) -> list[StepClock]:
    """Run jobs, each a model and what it does, step by step in turns; return the clock of each.

    Each has a thread of its own, of which one runs at a time. So what disturbs a machine disturbs all of them.
    """
    turns = [threading.Semaphore(int(mine == 0)) for mine in range(len(jobs))]
    running, errors = list(range(len(jobs))), []
    clocks: list[StepClock] = [None] * len(jobs)

    def pass_on(mine: int) -> None:
        later = [other for other in running if other > mine] or running
        if later:
            turns[later[0]].release()

    def pause(mine: int) -> None:
        pass_on(mine)
        turns[mine].acquire()

    def run(mine: int) -> None:
        model, work = jobs[mine]
        turns[mine].acquire()
        try:
            torch.set_num_threads(1)
            with StepClock(model, lambda: pause(mine)) as clocks[mine]:
                work()
        except BaseException as error:
            errors.append(error)
        running.remove(mine)
        pass_on(mine)

    threads = [threading.Thread(target=run, args=(mine,)) for mine in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return clocks


def random_text(model, rows: int, tokens: int) -> torch.Tensor:
    """Return ids `[rows, tokens]`, BOS first, always the same ones; structure does not stand among the others."""
    config = model.config
    ids = torch.randint(32, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0 if config.bos_token_id is None else config.bos_token_id
    return ids


def middle_canvas(model, tokens: int) -> dict:
    """Return the canvas of a random text that grows in its middle only, so that half of it moves at every step."""
    ids = random_text(model, 1, tokens)
    slot_mask = torch.zeros_like(ids, dtype=torch.bool)
    slot_mask[:, tokens // 2 - 1] = True
    return {"input_ids": ids, "slot_mask": slot_mask}


def write(model, tokens: int, steps: int, rows: int = 1, **options):
    """Write exactly `steps` tokens into the middle of a text, greedily, or sampling into several copies of it."""
    copies = {"do_sample": False} if rows == 1 else {"do_sample": True, "top_k": 0, "num_return_sequences": rows}
    lengths = {"max_new_tokens": steps, "min_new_tokens": steps}
    return model.generate(**middle_canvas(model, tokens), **lengths, **{"ebr": False, **copies, **options})
