"""Two threads and one transformer: refused, for what is kept would mix; with two it goes."""

import threading

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from runs import on, run
from tiny import tiny_wan

import dit_accel
from dit_accel import TokenPruning


def together(pipes):
    """What a run of each gives, in a thread each: latents or an exception."""
    found = [None, None]

    def go(i):
        try:
            with torch.no_grad():
                found[i] = run(pipes[i], steps=4, seed=i)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=go, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def second(pipe):
    """Another pipeline of the same transformer."""
    parts = {**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture
def held():
    """A transformer in which the first thread stays until the second has called it."""
    pipe, inside, over = tiny_wan(layers=3), threading.Event(), threading.Event()

    def hold(module, inputs):
        if not inside.is_set():
            inside.set()
            assert over.wait(60)

    handle = pipe.transformer.blocks[0].register_forward_pre_hook(hold)
    yield pipe, inside, over
    handle.remove()


@pytest.mark.parametrize("options", [{}, {"prune": TokenPruning(keep=0.5, start=1)}], ids=str)
def test_a_second_one_is_refused_and_the_first_one_is_right(held, options):
    pipe, inside, over = held
    other, method = second(pipe), "dense" if options else "shared@0.3"
    over.set()
    inside.set()
    with on(pipe, method, **options):
        alone = run(pipe, steps=4)
    inside.clear()
    over.clear()
    found = []
    with on(pipe, method, **options):
        thread = threading.Thread(target=lambda: found.append(run(pipe, steps=4)))
        thread.start()
        assert inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match="two threads run this WanTransformer3DModel"):
                run(other, steps=4)
        finally:
            over.set()
        thread.join()
        assert torch.equal(found[0], alone)
        assert run(other, steps=4).isfinite().all()  # the other thread is through


def test_a_step_cache_alone_is_of_one_thread_too(held):
    pipe, inside, over = held
    with dit_accel.step_cached(pipe, 0.1):
        thread = threading.Thread(target=lambda: run(pipe))
        thread.start()
        assert inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match="two threads"):
                run(second(pipe))
        finally:
            over.set()
        thread.join()


def test_a_thread_whose_call_failed_holds_nothing():
    pipe, gone = tiny_wan(layers=3), threading.Event()

    def fail(module, inputs):
        raise KeyError("in a block")

    def call():
        with pytest.raises(KeyError):
            run(pipe)
        failed.set()
        assert gone.wait(60)

    failed = threading.Event()
    with on(pipe, "shared@0.3"):
        handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
        thread = threading.Thread(target=call)
        thread.start()
        assert failed.wait(60)
        handle.remove()
        assert run(pipe).isfinite().all()
        gone.set()
        thread.join()


def test_transformers_of_their_own_do_not_wait_for_each_other():
    pipes = [tiny_wan(layers=3), tiny_wan(layers=3)]
    with on(pipes[0], "shared@0.3"), on(pipes[1], "shared@0.3"):
        alone = [run(pipe, steps=4, seed=i) for i, pipe in enumerate(pipes)]
        for found, wanted in zip(together(pipes), alone, strict=True):
            assert torch.equal(found, wanted)
