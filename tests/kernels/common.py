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
