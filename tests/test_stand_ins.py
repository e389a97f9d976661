"""Protects what is said of a GPU without one: the stand-in counts kernels, copies and waits of work that is known."""

import numpy as np
import torch

from kdcache.system.transfer import to_device
from tests.stand_ins import STAND_IN, launched, stand_in_gpu


def test_kernels_copies_and_waits_are_counted() -> None:
    with stand_in_gpu() as gpu:
        x = torch.ones(4, 3, device=gpu, requires_grad=True)

        def work() -> None:
            y = (x.view(2, 6) * 2).sum()  # a view starts nothing
            y.backward()
            to_device(np.ones(3), gpu)
            torch.ones(3).to(gpu)
            y.item()
            y.cpu()

        found = launched(work)
    assert found.by_operation["aten::mul"] == 2  # forward and backward
    assert found.copies == 2
    assert found.waits == {"a copy from the host": 1, "aten::_local_scalar_dense": 1, "a copy to the host": 1}


def test_a_tensor_made_of_numbers_is_a_copy_that_is_waited_for() -> None:
    with stand_in_gpu() as gpu:
        found = launched(lambda: torch.tensor([1.0, 2.0], device=gpu))
    assert (found.copies, found.waits) == (1, {"a copy from the host": 1})


def test_lists_of_tensors_of_other_shapes_are_a_kernel_each() -> None:
    with stand_in_gpu() as gpu:
        tensors = [torch.empty(number + 1, device=gpu) for number in range(5)]
        one_by_one = launched(lambda: torch._foreach_mul_(tensors, list(torch.empty(5, device=gpu).unbind())))
        at_once = launched(lambda: torch._foreach_mul_(tensors, 2.0))
    assert (one_by_one.kernels, at_once.kernels) == (5, 1)


def test_operands_that_torch_copies_by_itself_are_counted() -> None:
    with stand_in_gpu() as gpu:
        x = torch.ones(4, device=gpu)

        def work() -> None:
            torch.where(x > 0, x, torch.tensor(0.0))
            torch.where(x > 0, x, 0.0)  # a number that is made on the device
            x[torch.tensor([1, 2])]
            x.clamp(min=0) + 1.0  # a number that the kernel is given

        found = launched(work)
    assert found.copies == 2
    assert found.waits == {"an operand of aten::where on the host": 1, "an operand of aten::index on the host": 1}


def test_work_on_the_host_is_no_launch() -> None:
    found = launched(lambda: (torch.ones(3) + 1).sum().item())
    assert (found.kernels, found.copies, sum(found.waits.values())) == (0, 0, 0)


def test_a_cpu_gets_the_memory_itself() -> None:
    values = np.arange(4)
    values[0] = 7
    moved = to_device(values, torch.device("cpu"))
    assert moved.data_ptr() == values.ctypes.data
    assert moved[0] == 7
    assert to_device(values, STAND_IN).device == STAND_IN


def test_a_copy_to_the_host_is_waited_for() -> None:
    """Whoever has it may read it at once."""
    with stand_in_gpu() as gpu:
        found = launched(lambda: to_device(torch.ones(3, device=gpu), torch.device("cpu")))
    assert found.waits == {"a copy to the host": 1}
