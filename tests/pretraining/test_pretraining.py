"""Training of small DiTs, and the one that comes with the package."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, run_tool
from mmengine.config import Config
from safetensors.torch import load_file

from mmaselect import ASelectDiT
from mmaselect.diffusion.families.dit import FREQUENCY_SHIFT
from mmaselect.diffusion.noise import seeded_generator
from mmaselect.pretraining import FlowMatching

ASSETS = ROOT / 'mmaselect/assets/dit-nano_digits/transformer'
TINY = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, sample_size=16)


def test_the_loss_is_the_error_of_the_velocity(monkeypatch):
    model = FlowMatching(dict(TINY, num_embeds_ada_norm=1))
    seen = {}

    def velocity(latent, timestep, class_labels):
        seen.update(latent=latent, timestep=timestep, labels=class_labels)
        return type('Output', (), {'sample': torch.zeros_like(latent)})

    monkeypatch.setattr(model.transformer, 'forward', velocity)
    images = torch.rand(4, 1, 16, 16).expand(-1, 3, -1, -1) * 2 - 1
    noise = torch.randn(4, 1, 16, 16, generator=seeded_generator(model.seed, int(model.step), 0))
    loss = model(images)['loss']
    data = images[:, :1]
    assert loss.item() == pytest.approx((data - noise).square().mean().item(), rel=1e-5)
    time = seen['timestep'].view(-1, 1, 1, 1)
    torch.testing.assert_close(seen['latent'], time * data + (1 - time) * noise)
    assert ((time > 0) & (time < 1)).all()
    assert seen['labels'].tolist() == [1] * 4


def test_noise_depends_on_seed_step_and_rank_alone(monkeypatch):
    from mmaselect.pretraining import objective

    def losses(seed, steps):
        torch.manual_seed(0)
        model = FlowMatching(dict(TINY, num_embeds_ada_norm=1), seed=seed)
        return [model(images)['loss'].item() for _ in range(steps)]

    images = torch.rand(4, 3, 16, 16) * 2 - 1
    first = losses(0, 2)
    assert losses(0, 2) == first
    assert first[0] != first[1]
    assert losses(1, 1)[0] not in first
    monkeypatch.setattr(objective, 'get_rank', lambda: 1)
    assert losses(0, 1)[0] not in first


def test_half_precision_computes_the_network_and_keeps_weights_and_loss(monkeypatch):
    from mmaselect.errors import InputError

    images = torch.rand(4, 3, 16, 16) * 2 - 1
    losses, seen = {}, []

    def note(module, args, output):
        seen.append(output.dtype)

    for dtype in (None, 'bfloat16'):
        torch.manual_seed(0)
        model = FlowMatching(dict(TINY, num_embeds_ada_norm=1), autocast=dtype)
        torch.nn.init.normal_(model.transformer.proj_out_2.weight, std=0.1)
        model.transformer.transformer_blocks[0].attn1.to_q.register_forward_hook(note)
        losses[dtype] = model(images)['loss']
        assert seen.pop() == (torch.bfloat16 if dtype else torch.float32)
        assert losses[dtype].dtype == torch.float32
        losses[dtype].backward()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses['bfloat16'].item() == pytest.approx(losses[None].item(), rel=0.01)
    assert losses['bfloat16'] != losses[None]
    with pytest.raises(InputError, match="dtype='int8' is not known; choose from: float32, bfloat16, float16"):
        FlowMatching(TINY, autocast='int8')


@pytest.mark.parametrize('shift', (None, 0))
def test_what_is_exported_is_what_the_backbone_runs(tmp_path, shift):
    extra = {} if shift is None else {FREQUENCY_SHIFT: shift}
    model = FlowMatching(dict(TINY, num_embeds_ada_norm=1, **extra)).eval()
    model.export(tmp_path)
    assert json.loads((tmp_path / 'transformer/config.json').read_text()).get(FREQUENCY_SHIFT) == shift
    diffusion = dict(type='SiT', pretrained=tmp_path, latent='pixels')
    backbone = ASelectDiT(diffusion, block=1, component='output', timestep=300, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = torch.rand(2, 1, 16, 16).expand(-1, 3, -1, -1) * 255
    seen = []
    model.transformer.transformer_blocks[1].register_forward_hook(lambda _, __, output: seen.append(output))
    clean = pixels[:, :1] / 127.5 - 1
    from mmaselect.diffusion.noise import seeded_noise

    noisy = 0.7 * clean + 0.3 * seeded_noise((1, 16, 16), 0)
    with torch.no_grad():
        model.transformer(noisy, timestep=torch.full((2,), 0.7), class_labels=torch.full((2,), 1))
    torch.testing.assert_close(backbone(pixels)[0].flatten(2).transpose(1, 2), seen[0], rtol=1e-4, atol=1e-5)


def test_the_embedded_model_is_the_one_of_its_config():
    config = Config.fromfile(ROOT / 'configs/pretrain/dit-nano_digits.py')
    stored = json.loads((ASSETS / 'config.json').read_text())
    for key, value in config.model.transformer.items():
        assert stored[key] == value, key
    assert config.export_dir == 'mmaselect/assets/dit-nano_digits'
    assert (ASSETS / 'diffusion_pytorch_model.safetensors').stat().st_size < 8e6


def test_the_embedded_model_has_learned():
    """On digits that it never saw: far below the error of predicting the mean velocity."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # The split of tools/dataset_converters/prepare_digits.py.
    _, unseen = train_test_split(np.arange(1797), test_size=597, random_state=0, stratify=digits.target)
    model = FlowMatching(Config.fromfile(ROOT / 'configs/pretrain/dit-nano_digits.py').model.transformer).eval()
    model.transformer.load_state_dict(load_file(ASSETS / 'diffusion_pytorch_model.safetensors'))
    images = torch.tensor(digits.images[unseen], dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, size=16, mode='bicubic').clamp(-1, 1).expand(-1, 3, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        loss = model(images)['loss'].item()
    data = images[:, :1]
    assert loss < 0.25 * (1 + data.var().item())


def test_the_tool_trains_exports_and_resumes(digits, tmp_path):
    def pretrain(iterations, *more):
        options = [f'train_dataloader.dataset.data_root={digits}', f'train_cfg.max_iters={iterations}',
                   'model.transformer.num_layers=2', 'default_hooks.checkpoint.interval=10',
                   'train_dataloader.batch_size=16',
                   'default_hooks.logger.interval=1']  # fmt: skip
        return run_tool(
            'pretrain.py', ROOT / 'configs/pretrain/dit-nano_digits.py', '--work-dir', tmp_path / 'run',
            '--out', tmp_path / 'out', *more, '--cfg-options', *options,
        )  # fmt: skip

    done = pretrain(10)
    assert done.returncode == 0, done.stderr[-3000:]
    before = load_file(tmp_path / 'out/transformer/diffusion_pytorch_model.safetensors')
    done = pretrain(20, '--resume')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Iter(train) [11/20]' in done.stdout
    assert 'Iter(train) [10/20]' not in done.stdout
    after = load_file(tmp_path / 'out/transformer/diffusion_pytorch_model.safetensors')
    assert not torch.equal(before['proj_out_2.weight'], after['proj_out_2.weight'])
    # The exported weights are the averaged ones of the checkpoint, not those of the last step.
    checkpoint = torch.load(tmp_path / 'run/iter_20.pth', weights_only=True)
    assert torch.equal(after['proj_out_2.weight'], checkpoint['state_dict']['transformer.proj_out_2.weight'])
    last_step = checkpoint['ema_state_dict']['module.transformer.proj_out_2.weight']
    assert not torch.equal(after['proj_out_2.weight'], last_step)
