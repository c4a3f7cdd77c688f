"""What an installed wheel must do, outside the checkout, with the wheel and torch alone."""

import pathlib
import sys

import torch

import fastft

assert pathlib.Path(fastft.__file__).is_relative_to(sys.prefix), fastft.__file__
assert fastft.__version__ != "0+unknown", fastft.__version__
assert "triton" not in sys.modules
assert fastft.native.available(), fastft.native.load_error()
info = fastft.native.build_info()

x = torch.randn(8, 32, requires_grad=True)
weight, a, b = torch.randn(48, 32), torch.randn(4, 32), torch.randn(48, 4)
y = fastft.ops.lora_linear(x, weight, a, b, scaling=0.5, backend="cpu")
torch.testing.assert_close(y, x @ weight.t() + 0.5 * (x @ a.t()) @ b.t(), rtol=1e-4, atol=1e-4)

labels = torch.randint(48, (8,))
head = torch.randn(48, 32)
loss = fastft.ops.linear_cross_entropy(x, head, labels, backend="cpu")
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x @ head.t(), labels))
loss.backward()

optimizer = fastft.optim.AdamW([x])
optimizer.step()
print(f"fastft {fastft.__version__} works here: {info}")
