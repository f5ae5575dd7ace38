"""The host's part of what a chain on a device spills: its mailboxes. No device is asked: the words are written here, as one would."""

import gc
import threading

import torch

from mnet_fx.arithmetic import device_planes
from mnet_fx.arithmetic.device_planes import Planes, Reserve
from mnet_fx.arithmetic.formats import Format


def planes(steps):
    return Planes([0.9] * steps, Format.of(torch.float32), True, torch.zeros(8, dtype=torch.int32), Reserve(2))


def test_a_mailbox_is_not_used_again_before_the_device_has_written_of_steps_taken_again():
    chain = planes(3)
    words = chain.words
    for t in range(3):
        chain.make_room(t)
        chain.launching(t)
        words[t + 1] = 0
    chain.make_room(1)
    chain.launching(1)  # a second backward pass; the device is far behind
    address = chain.mail.address
    del chain
    assert planes(3).mail.address != address
    words[2] = 0
    held = [planes(3) for _ in range(2)]
    assert address in [chain.mail.address for chain in held]


def test_a_chain_that_the_garbage_collector_finds_while_a_mailbox_is_taken(monkeypatch):
    class Cycle:
        pass

    made = device_planes.Mailbox.__init__

    def collecting(box, *arguments):
        gc.collect()  # as any allocation may
        made(box, *arguments)

    monkeypatch.setattr(device_planes.Mailbox, "__init__", collecting)

    def chains():
        for steps in (41, 42, 43):
            cycle = Cycle()
            cycle.itself, cycle.planes = cycle, planes(steps)
            del cycle

    thread = threading.Thread(target=chains, daemon=True)  # which a lock that cannot be taken again would hold forever
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
