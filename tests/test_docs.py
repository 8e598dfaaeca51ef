"""The code in the guides runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(768, 768), nn.Linear(768, 768)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.q_proj(x)) * self.v_proj(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.eval()  # as from_pretrained gives a model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x)


def test_the_run_of_the_guide_to_continual_learning() -> None:
    """Two tasks of two classes around four centres, which the prototypes tell apart."""
    run, _ = snippets("docs/continual_learning.md")
    torch.manual_seed(0)
    centres = torch.randn(4, 768)
    tasks = []
    for task in range(2):
        labels = torch.arange(2).repeat(8)
        images = centres[2 * task + labels] + 0.3 * torch.randn(16, 768)
        tasks.append((images, 2 * task + labels, list(zip(images.split(8), labels.split(8), strict=True))))
    names = {"model": Model(), "tasks": tasks}
    exec(run, names)
    assert names["method"].task == 2 and type(names["plain"].attention.q_proj) is nn.Linear
    found = torch.cat([names["prototypes"].predict(names["method"].outputs(images)[0]) for images, _, _ in tasks])
    assert torch.equal(found, torch.cat([labels for _, labels, _ in tasks]))


def test_the_run_of_the_readme() -> None:
    (run,) = [code for code in snippets("README.md") if "CLoRA(" in code]
    torch.manual_seed(0)
    x, y = torch.randn(8, 768), torch.arange(8) % 3
    tasks = [([(x, y)], nn.Linear(768, 3)) for _ in range(2)]
    before = [head.weight.clone() for _, head in tasks]
    names = {"model": Model(), "tasks": tasks, "torch": torch, "F": F}
    exec(run, names)
    assert not any(torch.equal(head.weight, old) for (_, head), old in zip(tasks, before, strict=True))
    assert type(names["plain"].attention.q_proj) is nn.Linear and names["method"].task == 2


def test_the_method_of_the_guide_is_o_lora() -> None:
    names: dict = {}
    exec(snippets("docs/continual_learning.md")[1], names)
    method = names["OLoRA"](Model(), ["q_proj", "v_proj"], r=2)
    for task in (1, 2, 3):
        method.begin_task()
        losses = method.extra_losses()
        assert set(losses) == (set() if task == 1 else {"orthogonality"})
        if task > 1:
            old = [torch.cat([method.folded(t)[n]["lora_A"] for t in range(1, task)]) for n in method.layers]
            expected = sum((m.lora_A @ o.mT).abs().sum() for m, o in zip(method.layers.values(), old, strict=True))
            torch.testing.assert_close(losses["orthogonality"], 0.5 * expected)
        with torch.no_grad():
            for layer in method.layers.values():
                layer.lora_B.normal_()
        before = method.model(torch.ones(1, 768))
        method.end_task()
        torch.testing.assert_close(method.model(torch.ones(1, 768)), before)


def test_the_guide_for_users_of_peft(tmp_path, monkeypatch) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    from clora_kernels.integrations.peft import RoutedLoraConfig

    monkeypatch.chdir(tmp_path)
    faster, method = snippets("docs/peft.md")
    x = torch.ones(2, 768)
    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    names = {"model": model}
    exec(faster, names)
    assert set(names["report"].left_alone.values()) == {"accelerate() was not called since it was made or restored"}
    plain = Model()
    names = {"model": plain}
    exec(method, names)
    model = names["model"]
    assert isinstance(model.peft_config["default"], RoutedLoraConfig)
    torch.manual_seed(0)
    again = Model()
    again.load_state_dict({k.replace("base_layer.", ""): v for k, v in model.base_model.model.state_dict().items()
                           if "routed" not in k and "lora_" not in k and "routing" not in k})  # fmt: skip
    stock = PeftModel.from_pretrained(again, tmp_path / "stock")
    torch.testing.assert_close(stock(x), model(x))


def test_the_call_of_the_guide_to_the_kernels() -> None:
    (code,) = snippets("docs/kernels.md")
    names: dict = {}
    torch.manual_seed(0)
    exec(code, names)
    # Sums of 256 products, whose terms are not much larger than the largest sum.
    assert 0 < names["error"] <= 256 * torch.finfo(torch.float32).eps * names["truth"].abs().max()
