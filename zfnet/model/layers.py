"""Layers that replace PyTorch's, and changes to the layers of any network."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zfnet.config.randomness import DROPOUT, make_key, uniform


class LocalResponseNorm(nn.Module):
    """y_c = x_c · (k + α Σ x²)^(−β), where the sum runs over the `size` maps around c (Krizhevsky 2012, section 3.3).

    The default constants are Krizhevsky's; the ZFNet paper gives none. As in his paper, α multiplies the sum (his code
    divides it by `size`). In PyTorch and Caffe α multiplies the mean, so α here is 1/size of theirs. A 1×1 convolution
    with a banded matrix computes the sum. On a CPU it is 3 times as fast as `nn.LocalResponseNorm`; on CUDA its
    backward pass is deterministic, unlike that of `nn.LocalResponseNorm`.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        if size % 2 == 0:
            # backward relies on a symmetric band, and only an odd size gives one
            raise ValueError(f"size={size}: must be odd")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [N, C, H, W]."""
        offsets = torch.arange(x.shape[1], device=x.device)
        # compute in fp32 even in mixed precision: bf16 would round α x² away when it is added to k
        dtype = torch.promote_types(x.dtype, torch.float32)
        band = ((offsets[:, None] - offsets).abs() <= self.size // 2).to(dtype)
        with _without_autocast(x.device.type):
            out: Tensor = _Normalise.apply(x.to(dtype), band[:, :, None, None], self.alpha, self.beta, self.k)
        return out

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode within the block; restore the mode of each of its modules afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        model.train(modes[model])  # an overridden `train` can do more than set the mode
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Disable autocast within the block; on CUDA also use IEEE fp32 (not TF32) and deterministic kernels.

    Explanations use it. The previous settings are restored afterwards.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    conv = cudnn.conv  # type: ignore[attr-defined]
    kernels, precisions = (cudnn.deterministic, cudnn.benchmark), (conv.fp32_precision, matmul.fp32_precision)
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        try:
            cudnn.deterministic, cudnn.benchmark = True, False
            # set the older names first: reading them raises an error if they differ from the newer ones
            cudnn.allow_tf32 = matmul.allow_tf32 = False
            conv.fp32_precision = matmul.fp32_precision = "ieee"
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = kernels
            cudnn.allow_tf32, matmul.allow_tf32 = (precision == "tf32" for precision in precisions)
            conv.fp32_precision, matmul.fp32_precision = precisions


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    # avoid `torch.amp.is_autocast_available`: torch.compile of PyTorch 2.10 fails on it, and retries in each step
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, band, alpha, beta, k):
        scale = F.conv2d(x * x, band * alpha).add_(k)
        power = torch.rsqrt(scale * scale.sqrt()) if beta == 0.75 else scale.pow(-beta)
        ctx.save_for_backward(x, band, scale, power)
        ctx.constants = alpha, beta
        return x * power

    @staticmethod
    @once_differentiable  # the saved tensors have no graph
    def backward(ctx, grad):
        # dy_i/dx_j = δ_ij s_j^−β − 2αβ x_i s_i^(−β−1) x_j for i within the band around j
        x, band, scale, power = ctx.saved_tensors
        alpha, beta = ctx.constants
        with _without_autocast(x.device.type):  # a training loop can call backward within autocast
            spread = F.conv2d(grad * x * power / scale, band * (2 * alpha * beta))
        return grad * power - x * spread, None, None, None, None


class Dropout(nn.Module):
    """Dropout with a mask that is a function of a key and of each image's index in the global batch.

    p: probability of dropping an entry; whole_channels: drop whole channels, as `nn.Dropout2d` does

    It is ordinary dropout until `set_key` is called. With a key, a step's mask is the same after a resume, on every
    device, and for every division of the batch into chunks or among processes. A module that the network calls several
    times in one forward pass uses a different mask in each call.
    """

    key: Tensor
    first: Tensor
    calls: Tensor

    def __init__(self, p: float, whole_channels: bool = False) -> None:
        super().__init__()
        self.p, self.whole_channels, self.keyed = p, whole_channels, False
        # tensors, so that changing them does not recompile; not persistent, because they are functions of the step
        for name in ("key", "first", "calls"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=False)

    def set_key(self, key: int, first: int) -> None:
        """Use this key from now on; `first` is the index of the next input's first image in the global batch."""
        self.key.fill_(key)
        self.first.fill_(first)
        self.calls.zero_()
        self.keyed = True

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of x [N, …] in training mode; scale the others by 1 / (1 − p)."""
        if not self.training or self.p == 0:
            return x
        if not self.keyed:
            return torch.feature_dropout(x, self.p, True) if self.whole_channels else F.dropout(x, self.p)
        shape = (x.shape[1], *[1] * (x.ndim - 2)) if self.whole_channels else tuple(x.shape[1:])
        entries = math.prod(shape)
        rows = torch.arange(x.shape[0], device=x.device) + self.first
        index = rows[:, None] * entries + torch.arange(entries, device=x.device)
        # the first call uses the key unchanged
        key = (self.key + self.calls * 0x9E3779B1) & 0xFFFFFFFF
        self.calls.add_(1)
        keep = (uniform(key, index) >= self.p).to(x.dtype).mul_(1 / (1 - self.p) if self.p < 1 else 0)
        return x * keep.view(-1, *shape)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", whole_channels=True" if self.whole_channels else "")


# all of these are identities in evaluation mode; alpha dropout has no keyed version
DROPOUTS = (Dropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def replace_dropout(model: nn.Module) -> int:
    """Replace PyTorch's dropout layers in a model by keyed `Dropout`, in place; return the number of replaced layers.

    `nn.Dropout1d`, `2d` and `3d` keep dropping whole channels. Alpha dropout and calls of `F.dropout` do not change:
    their masks come from PyTorch's generator.
    """
    device = next((p.device for p in model.parameters()), None)
    keyed: dict[nn.Module, Dropout] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            if module not in keyed:
                keyed[module] = Dropout(module.p, not isinstance(module, nn.Dropout)).to(device)
                keyed[module].train(module.training)
            model.set_submodule(name, keyed[module])
    return len(keyed)


def set_dropout_step(model: nn.Module, seed: int, step: int, first: int = 0) -> None:
    """Set the key of every `Dropout` for one step; `first` is the next input's first index in the global batch."""
    for number, module in enumerate(m for m in model.modules() if isinstance(m, Dropout)):
        module.set_key(make_key(seed, DROPOUT, step, number), first)


@torch.no_grad()
def renormalize_filters(model: nn.Module, limit: float) -> None:
    """Scale each `nn.Conv2d` filter with an RMS above `limit` down to that RMS (paper, section 3)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:  # not frozen
            rms = module.weight.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            # torch.where leaves filters within the limit bit-identical
            module.weight.copy_(torch.where(rms > limit, module.weight * (limit / rms), module.weight))
