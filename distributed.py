"""One run in several processes, each with episodes of its own: `torchrun --nproc-per-node 2 SCRIPT FLAGS`.

The recipe, which is all there is to data-parallel training:
  1. every process builds the same networks from the same seed, and draws everything else by its RANK;
  2. before each step of an optimiser, gradients are averaged over processes, so that the weights stay the same;
  3. numbers that steer the loop (steps taken, moments of the advantages, whether to stop) are summed over processes, so
     that all of them take the same turns;
  4. process 0 logs, saves and evaluates; for a checkpoint it gathers what the others alone have, their replay buffers.

In a process that torchrun has not started all of this does nothing.
"""

import atexit
import os

import torch
import torch.distributed as dist
import torch.nn as nn

from run_folder import fail

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def connect(device: torch.device) -> torch.device:
    """Meet the other processes; returns the device of this one."""
    if device.type == "cuda":
        here, found = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > found:
            fail(f"--cuda: must have a device for each of {here} processes, found {found}")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cpu":  # else gloo's threads may outlive the interpreter: an abort at the end
            atexit.register(dist.destroy_process_group)
    return device


def together(operation, *args) -> None:
    """A collective operation of torch.distributed; one line if it fails, which it does where a process is gone."""
    try:
        operation(*args)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        fail(f"another process of this run has ended ({why}); continue with --resume and as many processes", code=1)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        together(dist.all_reduce, values)
    return values


def moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the values of all processes."""
    wide = values.double()
    mean, count = total(torch.stack((wide.sum(), wide.new_tensor(wide.numel()))))
    mean = mean / count
    variance = total((wide - mean).square().sum()) / count
    return mean.to(values), variance.sqrt().to(values)


def average_gradients(network: nn.Module, count: int) -> None:
    """Gradients of a loss that is a mean over `count` samples here become those of the mean over all processes'."""
    if WORLD_SIZE > 1:
        gradients = [weights.grad for weights in network.parameters() if weights.grad is not None]
        sums = torch.cat([count * gradient.flatten() for gradient in gradients] + [gradients[0].new_tensor([count])])
        total(sums)
        for gradient, mean in zip(gradients, (sums[:-1] / sums[-1]).split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))


class Gathered:
    """What every process has its own of, a replay buffer, as one part of a checkpoint: process 0 gets a list."""

    def __init__(self, part):
        self.part = part

    def state_dict(self) -> dict | list | None:
        """To be called by all processes."""
        if WORLD_SIZE == 1:
            return self.part.state_dict()
        states = [None] * WORLD_SIZE if RANK == 0 else None
        together(dist.gather_object, self.part.state_dict(), states)
        return states

    def load_state_dict(self, states: dict | list) -> None:
        self.part.load_state_dict(states if WORLD_SIZE == 1 else states[RANK])
