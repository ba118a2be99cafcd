"""The free memory that a method's state is held against."""

import torch

from dit_accel.machine import free_bytes


def test_free_memory_is_a_share_of_the_machine():
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < free_bytes(torch.device("cpu")) < total


def test_an_unknown_device_is_unknown():
    assert free_bytes(torch.device("meta")) is None


def test_cuda_counts_what_the_allocator_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_bytes(torch.device("cuda")) == 1300
