import ctypes
import mmap

import torch


def prune(module, density, height=1):
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 2:
                kept = torch.rand(-(-weight.shape[0] // height), weight.shape[1]) < density
                weight.mul_(kept.repeat_interleave(height, dim=0)[: weight.shape[0]])
    return module.eval()


def relative_error(got, wanted):
    wanted = wanted.detach()
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


class Guarded:
    """Tensors that end where memory ends: a page before and one behind must not be touched."""

    def __init__(self):
        self.kept = []

    def __call__(self, tensor):
        if tensor is None or not tensor.numel():
            return tensor
        page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
        pages = -(-size // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=(1 + pages) * page - size)
        copy.copy_(tensor.flatten())
        first = copy.data_ptr() + size - (1 + pages) * page
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for guard in (first, first + (1 + pages) * page):
            assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        self.kept.append((memory, guard))
        return copy.view(tensor.shape)
