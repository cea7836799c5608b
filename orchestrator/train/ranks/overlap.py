"""Exchange of gradients during the last backward pass of a step.

The backward pass reaches the parameters roughly in reverse order. So a thread exchanges the regions
of the vector from the last to the first, each as soon as its gradients are complete. All ranks use
this order, even if their backward passes have another one. No bits depend on when a region is
exchanged.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from orchestrator.train.ranks.layout import Layout


class Overlap:
    """Exchanges regions in a thread; on a GPU, in a stream of its own.

    In each step: `begin` before the last backward pass, and `finish` after it. A backward pass must
    add once to the gradient of a parameter.

    Args:
        layout: The layout of the gradients.
    """

    def __init__(self, layout: Layout) -> None:
        self.device = layout.params[0].device
        self.regions = range(len(layout.regions))
        # The regions of each parameter: buckets may cut it.
        self.inside: dict[Tensor, list[int]] = {
            param: [
                region
                for region, (start, stop) in enumerate(layout.regions)
                if offset < stop and start < offset + param.numel()
            ]
            for param, offset in layout.offsets.items()
        }
        self.parameters = [
            {param for param, regions in self.inside.items() if region in regions}
            for region in self.regions
        ]
        self.missing: list[set[Tensor]] = []  # parameters without gradient, by region
        self.ready: list[_Ready] = []
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
        # Python does not collect a cycle through the hook of a tensor, and the model would stay in
        # a process that trains many stages.
        hook = functools.partial(_has_gradient, weakref.ref(self))
        for param in layout.params:
            param.register_post_accumulate_grad_hook(hook)

    def begin(self, exchange: Callable[[int], None]) -> None:
        """Start the thread. The next backward pass is the last one of the step.

        Args:
            exchange: Exchanges a region.
        """
        self.missing = [set(parameters) for parameters in self.parameters]
        self.ready = [_Ready(self.stream) for _ in self.regions]
        self.error = None
        # A daemon, because an error elsewhere must not keep the process from exiting.
        self.thread = threading.Thread(target=self._exchange_all, args=(exchange,), daemon=True)
        self.thread.start()
        self._set_complete(self.regions)  # some have no parameters

    @property
    def has_begun(self) -> bool:
        """Whether `finish` is due."""
        return self.thread is not None

    def finish(self) -> None:
        """Wait until all regions are exchanged. Raise the error of their exchange."""
        assert self.thread is not None
        for ready in self.ready:
            ready.set()  # also those of parameters that the loss does not depend on
        self.thread.join()
        self.thread = None
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        if self.error is not None:
            raise self.error

    def note_gradient(self, param: Tensor) -> None:
        """Count a parameter whose gradient is complete."""
        if self.thread is None:
            return
        for region in self.inside[param]:
            self.missing[region].remove(param)
        self._set_complete(self.inside[param])

    def _set_complete(self, regions: Iterable[int]) -> None:
        for region in regions:
            if not self.missing[region]:
                self.ready[region].set()

    def _exchange_all(self, exchange: Callable[[int], None]) -> None:
        try:
            with self._in_stream():
                for region in reversed(self.regions):
                    self.ready[region].wait()
                    exchange(region)
        except BaseException as error:
            self.error = error

    def _in_stream(self) -> AbstractContextManager[None]:
        if self.stream is None:
            return nullcontext()
        torch.cuda.set_device(self.device)  # of this thread
        return torch.cuda.stream(self.stream)


def _has_gradient(overlap: weakref.ref[Overlap], param: Tensor) -> None:
    found = overlap()
    if found is not None:
        found.note_gradient(param)


class _Ready:
    """Tells a thread, and its stream on a GPU, that the gradients of a region are complete."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.event = threading.Event()
        self.computed: torch.cuda.Event | None = None

    def set(self) -> None:
        """Say that they are complete. The current stream computes the last of them."""
        if self.event.is_set():
            return
        if self.stream is not None:
            self.computed = torch.cuda.current_stream(self.stream.device).record_event()
        self.event.set()

    def wait(self) -> None:
        """Wait until they are complete."""
        self.event.wait()
        if self.stream is not None and self.computed is not None:
            self.stream.wait_event(self.computed)
