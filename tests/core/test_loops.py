"""The engine's loop, and waits that let go without cancelling."""

import asyncio
import concurrent.futures
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from cm_notebook.errors import CodeMachineError
from cm_notebook.loops import engine_loop, run_sync, running_loop, wait_detached


async def value(result=1):
    return result


def on_engine(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, engine_loop())


def test_one_loop_on_its_own_thread():
    async def where():
        return asyncio.get_running_loop(), threading.current_thread()

    loop, thread = on_engine(where()).result(5)
    assert loop is engine_loop()
    assert thread is not threading.main_thread()
    assert (thread.name, thread.daemon) == ("cm-engine", True)


def test_many_threads_get_the_same_loop_at_first_use():
    code = """
import threading
from cm_notebook.loops import engine_loop
start, seen = threading.Barrier(8), []
def ask():
    start.wait()
    seen.append(engine_loop())
threads = [threading.Thread(target=ask) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(set(map(id, seen))) == 1 and len(seen) == 8
assert sum(t.name == "cm-engine" for t in threading.enumerate()) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_nothing_starts_on_import():
    code = """
import sys, threading
import cm_notebook.loops
assert threading.active_count() == 1
assert "IPython" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_has_its_own_and_the_parents_goes_on():
    parents = engine_loop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point here
        child = os.fork()
    if child == 0:
        code = 1
        try:
            fresh = on_engine(value("child")).result(5) == "child" and engine_loop() is not parents
            gc.collect()  # the parent's loop must not be closed with the child's memory
            code = 0 if fresh else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert engine_loop() is parents
    assert on_engine(value("parent")).result(5) == "parent"


def test_run_sync_returns_raises_and_times_out():
    assert run_sync(on_engine(value(42))) == 42

    async def bad():
        raise TimeoutError("the work's own")

    with pytest.raises(TimeoutError, match="the work's own"):
        run_sync(on_engine(bad()), timeout_s=5)
    open_ended = concurrent.futures.Future()
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        run_sync(open_ended, timeout_s=0.01)
    assert not open_ended.done()
    open_ended.set_result("late")
    assert run_sync(open_ended, timeout_s=0) == "late"


def test_a_cancelled_future_raises_cancelled():
    gone = concurrent.futures.Future()
    gone.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        run_sync(gone)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_an_interrupt_arrives_at_once_and_leaves_the_work_alive():
    work = concurrent.futures.Future()
    main = threading.main_thread().ident
    waiting = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT))
    waiting.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_sync(work, timeout_s=10)
    assert time.monotonic() - began < 5
    assert not work.done()
    waiting.join()
    work.set_result("still here")
    assert run_sync(work) == "still here"


def test_waiting_on_the_engines_loop_for_itself_is_refused():
    async def waits_for_itself():
        run_sync(on_engine(asyncio.sleep(60)))

    with pytest.raises(CodeMachineError, match="Use `await`"):
        on_engine(waits_for_itself()).result(5)

    async def finished_is_fine():
        done = concurrent.futures.Future()
        done.set_result("known")
        return run_sync(done)

    assert on_engine(finished_is_fine()).result(5) == "known"

    async def another_thread_is_fine():
        return await asyncio.to_thread(lambda: run_sync(on_engine(value("far")), 5))

    assert on_engine(another_thread_is_fine()).result(5) == "far"


async def test_waiting_on_any_loop_that_does_the_work_is_refused():
    with pytest.raises(CodeMachineError, match="Use `await`"):
        run_sync(concurrent.futures.Future(), loop=running_loop())


async def test_wait_detached_wakes_at_once():
    work = concurrent.futures.Future()
    began = []

    def finish():
        began.append(time.monotonic())
        work.set_result("done")

    threading.Timer(0.02, finish).start()
    assert await wait_detached(work) == "done"
    assert time.monotonic() - began[0] < 0.2  # woken by the other thread, not by the end of a slice


async def test_wait_detached_works_on_the_engines_loop_too():
    async def outer():
        return await wait_detached(on_engine(value("inner")))

    assert await wait_detached(on_engine(outer()), timeout_s=5) == "inner"


async def test_cancelling_the_waiter_leaves_the_work_alive():
    work = concurrent.futures.Future()
    waiter = asyncio.create_task(wait_detached(work))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not work.done()
    work.set_result("still here")
    assert await wait_detached(work) == "still here"


async def test_a_time_out_leaves_the_work_alive():
    work = concurrent.futures.Future()
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        await wait_detached(work, timeout_s=0.01)
    assert not work.done()


async def test_the_works_own_time_out_is_not_taken_for_a_slice():
    work = concurrent.futures.Future()
    work.set_exception(TimeoutError("the work's own"))
    with pytest.raises(TimeoutError, match="the work's own"):
        await wait_detached(work, timeout_s=5)


def test_work_that_ends_after_its_waiters_loop_closed_says_nothing(caplog):
    work = concurrent.futures.Future()
    with pytest.raises(TimeoutError):
        asyncio.run(wait_detached(work, timeout_s=0.01))
    work.set_exception(ValueError("late"))
    gc.collect()
    assert caplog.text == ""  # with asyncio.wrap_future: "exception calling callback … loop is closed"
