"""Several processes that train together, started warm."""

import os
from datetime import timedelta

import torch
from torch import distributed

TIMEOUT = timedelta(minutes=5)


def join(number, world, folder):
    """Join the gloo process group; a file is the rendezvous."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=number,
        world_size=world,
        timeout=TIMEOUT,
    )


def leave(found, folder):
    """Save a result for `together`, and exit when all processes have done so."""
    torch.save(found, f"{folder}/{distributed.get_rank()}.pt")
    distributed.barrier()  # no process exits while another still communicates with it
    os._exit(0)  # torch's threads sometimes abort a normal exit of the interpreter


def together(warm, child, world, folder):
    """Run `child(rank, world, folder)` in `world` processes. Return what each passed to `leave`."""
    code = f"import sys; from {child.__module__} import {child.__name__} as child; "
    code += "child(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    started = [warm.start(["-c", code, number, world, folder]) for number in range(world)]
    wait_for_all(started)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(world)]


def wait_for_all(started):
    """Wait for all processes. If one fails, show the end of what each has written."""
    try:
        codes = [process.wait(400) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), "\n".join(process.errors()[-3000:] for process in started)


def meeting():
    """Host the rendezvous store on a free port, as torchrun's agent does."""
    return distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def begin(warm, words, world, store, folder, **settings):
    """Start processes as torchrun does. Process N writes its output to N.log in the folder."""
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": world}
    given |= {"TORCHELASTIC_USE_AGENT_STORE": True, "CUDA_VISIBLE_DEVICES": ""}
    started = []
    for number in range(world):
        ranks = {"RANK": number, "LOCAL_RANK": number}
        with (folder / f"{number}.log").open("wb") as log:
            files = {"stdout": log, "stderr": log}
            started.append(warm.start(words, env={**given, **ranks}, **files, **settings))
    return started
