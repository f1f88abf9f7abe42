"""Memory for pages that grows where it stands."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

Layout = tuple[Sequence[tuple[int, ...]], torch.dtype, torch.device]


class Memory:
    """The pages of every layer of one cache.

    On a GPU a layer keeps its addresses for as long as this object lives: memory is put behind them
    as pages are asked for and taken away by `release`. Nothing is copied, and a CUDA graph captured
    over the pages stays valid. Where the driver can't do that, and on the CPU, growing copies.

    Attributes:
        moves: how often pages have changed their address.
        layers: by number, the shapes, dtype and device that it was last resized with.
    """

    def __init__(self) -> None:
        self.moves = 0
        self.layers: dict[int, Layout] = {}
        self._spans: dict[int, _Span] = {}
        self._parts: dict[int, list[torch.Tensor]] = {}  # where no driver maps memory

    @staticmethod
    def sample(
        shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> list[torch.Tensor]:
        """Two pages as they lie in mapped memory, in PyTorch's own; see `resize`."""
        sizes = [math.prod(shape) for shape in shapes]
        pages = torch.empty((2, aligned_page(shapes)), dtype=dtype, device=device)
        parts = pages[:, : sum(sizes)].split(sizes, 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    @property
    def mapped(self) -> int:
        """Bytes behind addresses of a GPU; PyTorch's own statistics don't count them."""
        return sum(span.mapped for span in self._spans.values())

    def resize(
        self,
        index: int,
        pages: int,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Gives a layer `pages` pages, with what they held before.

        Args:
            index: the layer's number.
            pages: how many; what lies behind them is lost.
            shapes: what a page consists of; the parts of a page lie side by side.
            dtype, device: of the parts.

        Returns:
            For each of `shapes`, a tensor [pages, *shape].

        Raises:
            torch.OutOfMemoryError: if the device has not as much; what it holds is as before.
        """
        self.layers[index] = shapes, dtype, device
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            if device.type == "cuda" and _driver(device) is not None:
                span = self._spans.get(index)
                if span is None or span.device != device:
                    self.moves += 1
                    span = self._spans[index] = _Span(device)
                return span.resize(pages, shapes, dtype)
            self.moves += 1
            try:
                parts = [
                    torch.empty((pages, *shape), dtype=dtype, device=device) for shape in shapes
                ]
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):  # as PyTorch says of the CPU's
                    raise
                raise torch.OutOfMemoryError(*error.args) from None
            for part, held in zip(parts, self._parts.get(index, ()), strict=False):
                both = min(len(held), pages)
                part[:both] = held[:both]
            self._parts[index] = parts
            return parts

    def release(self) -> None:
        """Gives all memory back; what the pages held is gone."""
        self._parts.clear()
        for span in self._spans.values():
            span.release()


class _Span:
    """A range of a GPU's addresses with memory behind its first part.

    The virtual memory management of CUDA's driver API: as many addresses as the device has memory
    are reserved, and physical memory is mapped piece by piece.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._driver = _driver(device)
        self._size = torch.cuda.get_device_properties(device).total_memory
        self._property = self._driver.CUmemAllocationProp()
        self._property.type = self._driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._property.location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._property.location.id = device.index
        self._granule = _checked(
            self._driver.cuMemGetAllocationGranularity(
                self._property,
                self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        )
        self._size = -(-self._size // self._granule) * self._granule
        self._address = int(_checked(self._driver.cuMemAddressReserve(self._size, 0, 0, 0)))
        self._pieces: list[tuple[int, Any]] = []  # sizes and handles, in order
        self.mapped = 0

    def resize(
        self, pages: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        sizes = [math.prod(shape) for shape in shapes]
        # Whole rows of each part, as the copy engine of `hopper.py` wants it.
        page = aligned_page(shapes) * dtype.itemsize
        self._grow(pages * page)
        parts, begin = [], self._address
        for shape, size in zip(shapes, sizes, strict=True):
            inner = [math.prod(shape[i + 1 :]) * dtype.itemsize for i in range(len(shape))]
            # The parts of a page are tensors of their own to PyTorch: it must not take what is
            # written to one for a change of the other.
            part = _Part(self, begin, (pages, *shape), (page, *inner))
            parts.append(torch.as_tensor(part, device=self.device).view(dtype))
            begin += size * dtype.itemsize
        return parts

    def _grow(self, size: int) -> None:
        more = -(-(size - self.mapped) // self._granule) * self._granule
        if more <= 0:
            return
        driver, address = self._driver, self._address + self.mapped
        try:
            handle = _checked(driver.cuMemCreate(more, self._property, 0))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # PyTorch may hold free memory
            handle = _checked(driver.cuMemCreate(more, self._property, 0))
        access = driver.CUmemAccessDesc()
        access.location = self._property.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        try:
            _checked(driver.cuMemMap(address, more, 0, handle, 0))
            _checked(driver.cuMemSetAccess(address, more, [access], 1))
        except BaseException:
            driver.cuMemUnmap(address, more)  # if it came to that
            driver.cuMemRelease(handle)
            raise
        self._pieces.append((more, handle))
        self.mapped += more

    def release(self) -> None:
        if not self._pieces:
            return
        torch.cuda.synchronize(self.device)  # unmapping doesn't wait for kernels
        while self._pieces:  # an interrupt leaves what is still mapped
            size, handle = self._pieces.pop()
            self.mapped -= size
            _checked(self._driver.cuMemUnmap(self._address + self.mapped, size))
            _checked(self._driver.cuMemRelease(handle))

    def __del__(self) -> None:
        try:
            self.release()
            self._driver.cuMemAddressFree(self._address, self._size)
        except Exception:  # the process, and with it the driver, is about to end
            pass


class _Part:
    """Addresses in a span as PyTorch takes them up; the tensor keeps the span alive.

    Args:
        span: whose they are.
        address: of the first element.
        shape, strides: in elements and bytes.
    """

    def __init__(self, span: _Span, address: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self._span = span
        self.__cuda_array_interface__ = {
            "shape": shape,
            "strides": strides,
            "typestr": f"<i{strides[-1]}",  # the interface has no bfloat16
            "data": (address, False),
            "version": 3,
        }


def aligned_page(shapes: Sequence[tuple[int, ...]]) -> int:
    """Elements from a page to the next: whole rows of each part's last dim."""
    rows = math.lcm(*(shape[-1] for shape in shapes))
    return -(-sum(map(math.prod, shapes)) // rows) * rows


@functools.cache
def _driver(device: torch.device) -> ModuleType | None:
    """CUDA's driver API, if it is there and can map memory on `device`."""
    try:
        from cuda.bindings import driver  # comes with PyTorch for CUDA
    except ImportError:
        return None
    torch.cuda.init()
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    supported = _checked(driver.cuDeviceGetAttribute(attribute, device.index))
    return driver if supported else None


def _checked(result: tuple) -> Any:
    """What a driver call returned, or its error."""
    error, *values = result
    if error.name == "CUDA_ERROR_OUT_OF_MEMORY":
        raise torch.OutOfMemoryError("The device has no memory left for pages of K and V.")
    if error.value:
        raise RuntimeError(f"CUDA's driver says {error.name} to a call for pages of K and V.")
    return values[0] if values else None
