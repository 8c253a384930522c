"""mmsegmentation: UPerNet on frozen queries, by its own tools and APIs, with mmcv-lite."""

from __future__ import annotations

import json
import re
from itertools import zip_longest
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, run_tool, start_ranks
from mmengine.config import Config
from mmengine.registry import init_default_scope

CONFIG = ROOT / 'configs/segmentation/dit-micro_upernet_bs8-200_camvid-192x256.py'
ARCH = dict(num_layers=3, num_attention_heads=2, attention_head_dim=8, in_channels=3, sample_size=32, patch_size=4)


def mmseg_tool(name):
    import mmseg

    return Path(mmseg.__file__).parent / '.mim' / 'tools' / name


@pytest.fixture(scope='module')
def streets(tmp_path_factory):
    """Images of a bright half above a dark one, in CamVid's layout: sky (0), road (3) and a strip of no label (11)."""
    root = tmp_path_factory.mktemp('streets')
    for split, count in (('train', 6), ('val', 3)):
        for index in range(count):
            noise = np.random.default_rng(index).integers(0, 60, (96, 120, 3))
            horizon = 30 + 5 * index
            label = np.full((96, 120), 3, np.uint8)
            label[:horizon] = 0
            label[:, :6] = 11
            image = (noise + 180 * (label == 0)[..., None]).clip(0, 255).astype(np.uint8)
            for folder, content in (('img_dir', image), ('ann_dir', label)):
                path = root / folder / split / f'{index}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), content)
    return root


def options(root, **more):
    values = {f'{split}_dataloader.dataset.data_root': root for split in ('train', 'val', 'test')}
    values |= {'model.backbone.diffusion.pretrained': 'None', 'model.neck.embed_dim': 16}
    values |= {f'model.backbone.diffusion.arch.{key}': value for key, value in ARCH.items()}
    values |= {f'model.{head}.channels': 8 for head in ('decode_head', 'auxiliary_head')}
    values |= {'model.decode_head.in_channels': '[16,16,16,16]', 'model.auxiliary_head.in_channels': 16}
    values |= {'train_cfg.max_iters': 12, 'train_cfg.val_interval': 6, 'default_hooks.checkpoint.interval': 6}
    values |= {'custom_hooks.0.timesteps': '[0,100]', 'custom_hooks.0.num_images': 4, 'train_dataloader.batch_size': 2}
    values |= {'default_hooks.logger.interval': 1, **more}
    return ['--cfg-options', *(f'{key}={value}' for key, value in values.items())]


@pytest.fixture(scope='module')
def trained(streets, tmp_path_factory):
    """A run by mmseg's own, unmodified tools/train.py."""
    folder = tmp_path_factory.mktemp('segmentation')
    done = run_script(mmseg_tool('train.py'), CONFIG, '--work-dir', folder, *options(streets))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def scores(text):
    return [float(value) for value in re.findall(r'mIoU: ([\d.]+)', text)]


def test_training_by_mmsegs_own_tool(trained):
    folder, printed = trained
    selection = json.loads((folder / 'selection.json').read_text())
    assert selection['num_images'] == 4
    assert selection['config']['pipeline'] == 'train'
    assert len(scores(printed)) == 2
    # Bright sky above a dark road: two of the eleven classes, which a working path tells apart at once.
    classes = dict(re.findall(r'\|\s+(sky|road)\s+\|\s+([\d.]+)', printed.rsplit('per class results', 1)[1]))
    assert all(float(value) > 60 for value in classes.values()), classes


def test_testing_and_resuming_by_our_tools(trained, streets, tmp_path):
    folder, printed = trained
    done = run_tool('test.py', CONFIG, folder / 'iter_12.pth', '--work-dir', tmp_path, *options(streets))
    assert done.returncode == 0, done.stderr[-3000:]
    assert scores(done.stdout) == scores(printed)[-1:]
    more = options(streets, **{'train_cfg.max_iters': 14, 'train_cfg.val_interval': 2, 'model.test_cfg.mode': 'slide',
                               'model.test_cfg.crop_size': '(64,64)', 'model.test_cfg.stride': '(48,48)'})  # fmt: skip
    done = run_tool('train.py', CONFIG, '--work-dir', tmp_path, '--resume', folder / 'iter_12.pth', *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'comes with the checkpoint: nothing to select' in done.stdout
    assert 'Iter(train) [13/14]' in done.stdout
    # Windows of 64 pixels over images of 256x192, put together again.
    assert len(scores(done.stdout)) == 1
    assert scores(done.stdout)[0] > 40


def test_the_fisher_score_reads_pixel_labels(streets, tmp_path):
    config = tmp_path / 'fisher.py'
    hook = "type='TimestepSelectionHook', criterion=dict(type='FisherScore', ignore_index=11)"
    config.write_text(f"_base_ = ['{CONFIG}']\ncustom_hooks = [dict({hook}, timesteps=[0, 900], num_images=4)]\n")
    settings = [item for item in options(streets) if not item.startswith('custom_hooks')]
    done = run_tool('select_timestep.py', config, '--work-dir', tmp_path, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    curve = json.loads((tmp_path / 'selection.json').read_text())['scores']['Fisher Score (labels)']
    assert curve[0] > curve[1] > 0


def test_apis_in_one_process_with_both_toolboxes(trained, streets, tmp_path):
    """mmseg's APIs, then mmpretrain's, then mmseg's again, with a switch of the default scope between them."""
    import mmpretrain
    from mmpretrain import FeatureExtractor, ImageClassificationInferencer
    from mmpretrain.apis import ModelHub
    from mmseg.apis import MMSegInferencer, inference_model, init_model, show_result_pyplot

    folder, _ = trained
    config = Config.fromfile(folder / CONFIG.name)
    image = str(streets / 'img_dir/val/0.png')
    model = init_model(config, str(folder / 'iter_12.pth'), device='cpu')
    assert model.backbone.timestep is not None
    result = inference_model(model, image)
    assert result.pred_sem_seg.data.shape == (1, 96, 120)
    show_result_pyplot(model, image, result, show=False, out_file=str(tmp_path / 'painted.png'))
    assert cv2.imread(str(tmp_path / 'painted.png')).shape[1] >= 120

    init_default_scope('mmpretrain')
    # mmpretrain infers the task of a model from its metafile, so ours has to be told to its hub.
    name = 'dit-nano_linear_bs64-20e_digits-16px'
    if not ModelHub.has(name):
        ModelHub.register_model_index(ROOT / 'model-index.yml', config_prefix=ROOT)
    classifier = mmpretrain.get_model(name, device='cpu', backbone=dict(timestep=0)).eval()
    torch.save({'state_dict': classifier.state_dict(), 'meta': {}}, tmp_path / 'classifier.pth')
    named = mmpretrain.inference_model(classifier, image)
    assert 0 <= named['pred_label'] < 10
    path = str(ROOT / f'configs/demo/{name}.py')
    again = ImageClassificationInferencer(path, pretrained=str(tmp_path / 'classifier.pth'), device='cpu')(image)[0]
    assert again['pred_label'] == named['pred_label']
    assert np.allclose(again['pred_scores'], named['pred_scores'], atol=1e-5)
    (features,) = FeatureExtractor(classifier, device='cpu')(image, stage='backbone')[0]
    assert features.shape == (128, 8, 8)

    init_default_scope('mmseg')
    painted = MMSegInferencer(config, str(folder / 'iter_12.pth'), device='cpu')(image)
    assert np.array_equal(painted['predictions'], result.pred_sem_seg.data[0].numpy())


@pytest.mark.parametrize('block', ([1, 1, 1, 1], [0, 1, 2, 1]))
def test_four_levels_from_one_block_and_from_several(block):
    import mmseg.models  # noqa: F401
    from mmengine.model.utils import revert_sync_batchnorm
    from mmengine.registry import MODELS, DefaultScope

    config = Config.fromfile(CONFIG)
    config.model.backbone.diffusion = dict(type='SiT', arch=ARCH, latent='pixels')
    config.model.backbone.update(block=block, timestep=100)
    config.model.neck.embed_dim = 16
    config.model.decode_head.update(in_channels=[16] * 4, channels=8)
    config.model.auxiliary_head.update(in_channels=16, channels=8)
    init_default_scope('mmseg')
    try:
        model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
        assert [tap.block for tap in model.backbone.taps] == block
        # 61 and 90 are no multiples of the 4 pixels of a cell.
        levels = model.extract_feat(torch.randn(1, 3, 61, 90))
        assert [tuple(level.shape[2:]) for level in levels] == [(32, 46), (16, 23), (8, 11), (4, 5)]
        assert model(torch.randn(1, 3, 61, 90), mode='tensor').shape == (1, 11, 32, 46)
    finally:
        DefaultScope._instance_dict.clear()


def test_label_maps_and_test_time_augmentation(trained, streets, tmp_path):
    """Our tool writes what mmseg's own writes; with a mirror image the score changes a little."""
    folder, printed = trained
    checkpoint, found = folder / 'iter_12.pth', {}
    tools = {'ours': (run_tool, 'test.py'), 'own': (run_script, mmseg_tool('test.py'))}
    for name, (run, tool) in tools.items():
        out = tmp_path / name
        done = run(tool, CONFIG, checkpoint, '--work-dir', tmp_path, '--out', out, *options(streets))
        assert done.returncode == 0, done.stderr[-3000:]
        assert scores(done.stdout) == scores(printed)[-1:]
        found[name] = [cv2.imread(str(out / f'{index}.png'), cv2.IMREAD_UNCHANGED) for index in range(3)]
    assert found['ours'][0].shape == (96, 120)
    assert all(np.array_equal(ours, own) for ours, own in zip_longest(*found.values()))
    both = run_tool('test.py', CONFIG, checkpoint, '--work-dir', tmp_path, '--tta', *options(streets))
    assert both.returncode == 0, both.stderr[-3000:]
    assert abs(scores(both.stdout)[0] - scores(printed)[-1]) < 5
    assert scores(both.stdout) != scores(printed)[-1:]


def test_two_ranks_on_a_cpu_have_ordinary_batch_norm(streets, tmp_path):
    settings = options(streets, **{'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2})
    ranks = start_ranks(2, 'train.py', CONFIG, '--work-dir', tmp_path, *settings)
    printed = [''.join(process.communicate()) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed[0][-3000:]
    assert len(scores(printed[0])) == 1
    state = torch.load(tmp_path / 'iter_2.pth', weights_only=True)['state_dict']
    assert state['decode_head.fpn_bottleneck.bn.num_batches_tracked'] == 2
