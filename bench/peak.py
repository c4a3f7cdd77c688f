"""Peak memory of one implementation, measured where nothing else has run.

On a CPU the allocator keeps what earlier work freed, so a peak measured in a process with a past
flatters whoever runs second. Each measurement forks from a server that has imported everything and
run nothing: a clean heap for the price of a fork.
"""

from __future__ import annotations

import importlib
import multiprocessing
from multiprocessing.connection import Connection

import torch

from .declare import Case, Impl, Options, Step, Suite
from .measure import peak_above

# A step that never ends must not hang the run; the largest takes seconds.
TIMEOUT = 600.0


def peak_of(suite: Suite, case: Case, impl: Impl, options: Options) -> int | None:
    """Bytes the first step of `impl` needs at its peak above its inputs, or None where unknown."""
    if options.device.type == "cuda":
        # The CUDA allocator's own count is exact and has no past.
        return _measure(suite, case, impl, options)
    context = multiprocessing.get_context("forkserver")
    # Imported there, never run: a process that has started OpenMP threads must not be forked.
    context.set_forkserver_preload([f"bench.{suite.name}", *suite.preload])
    receiver, sender = context.Pipe(duplex=False)
    work = (suite.name, case.name, dict(case.facts), impl.name, options, torch.get_num_threads())
    process = context.Process(target=_child, args=(sender, work))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(TIMEOUT) else None
    except EOFError:
        return None
    finally:
        receiver.close()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def _child(sender: Connection, work: tuple[str, str, dict, str, Options, int]) -> None:
    suite_name, case_name, facts, impl_name, options, threads = work
    torch.set_num_threads(threads)
    suite: Suite = importlib.import_module(f"bench.{suite_name}").SUITE
    sender.send(_measure(suite, Case(case_name, facts), suite.impl(impl_name), options))
    sender.close()


def _measure(suite: Suite, case: Case, impl: Impl, options: Options) -> int | None:
    if suite.tiny is not None:
        # Code is loaded and thread pools are made on a small case: they are not the step's memory.
        impl.build(suite.prepare(suite.tiny(case), options)).run()
    inputs = suite.prepare(case, options)
    built: list[Step] = []

    def first_step() -> None:
        # Built inside the measurement: state an implementation makes for itself is its own.
        built.append(impl.build(inputs))
        built[0].run()

    peak = peak_above(first_step, options.device)
    return None if peak is None else peak - built[0].copies
