"""The reader, the selection and their Python interface need no OpenMMLab."""

from __future__ import annotations

import json

from conftest import TINY, run_code

SCRIPT = """
import json, sys
for name in ('mmengine', 'mmcv', 'mmpretrain', 'mmseg'):
    sys.modules[name] = None  # as if it were not installed
import torch
import mmaselect
arch = json.loads(sys.argv[1])
images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
model = mmaselect.load(dict(type='SiT', arch=arch, latent='pixels'), block='auto')
selection = mmaselect.select(model, images, timesteps=[0, 400], block='auto', progress=False)
features = mmaselect.extract(model, images, selection, pool=True, progress=False)
assert selection.table()
from mmaselect.tasks import match
found = match(model, images[0], [[3.5, 4.5]], images[0], selection, size=8)
assert found.points.shape == (1, 2)
roots = ('mmengine', 'mmcv', 'mmpretrain', 'mmseg')
loaded = [name for name, module in sys.modules.items() if module and name.split('.')[0] in roots]
print(json.dumps([selection.timestep, list(features.shape), loaded]))
"""


def test_selection_and_extraction_without_mmengine():
    arch = dict(TINY['SiT'], in_channels=3, out_channels=3)
    done = run_code(SCRIPT, json.dumps(arch))
    assert done.returncode == 0, done.stderr[-3000:]
    timestep, shape, loaded = json.loads(done.stdout.splitlines()[-1])
    assert timestep in (0, 400)
    assert shape == [8, 64]
    assert loaded == []
