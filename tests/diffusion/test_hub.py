"""Models on the hub, played by a server on this machine: what is fetched, and what is said where nothing comes."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
from urllib.parse import unquote

import pytest
import torch
from conftest import set_hub
from safetensors.torch import load_file, save_file

from mmaselect.diffusion.conditioning import default_prompt_file, load_prompt
from mmaselect.diffusion.loading import Source
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

QUERY = Tap(1, 'query')
COMMIT = '0123456789' * 4
ERRORS = {
    'me/gated': (401, 'GatedRepo'),
    'me/missing': (401, 'RepoNotFound'),
    'me/forbidden': (403, ''),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers ``/OWNER/NAME/resolve/REVISION/PATH`` from ``root/OWNER/NAME/REVISION``."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        owner, name, _, revision, path = unquote(self.path.lstrip('/')).split('/', 4)
        repository = f'{owner}/{name}'
        if revision == 'refs':
            revision, path = '/'.join(['refs', *path.split('/')[:2]]), path.split('/', 2)[2]
        self.server.asked.append((self.command, repository, revision, path, self.headers.get('Authorization')))
        folder = self.server.root / repository
        file = folder / revision.replace('/', '-') / path
        if repository in ERRORS:
            self.fail(*ERRORS[repository])
        elif not (folder / revision.replace('/', '-')).is_dir():
            self.fail(404, 'RevisionNotFound')
        elif not file.is_file():
            self.fail(404, 'EntryNotFound')
        else:
            content = file.read_bytes()
            self.send_response(200)
            self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header('X-Repo-Commit', hashlib.sha1(revision.encode()).hexdigest())
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    def fail(self, status, code):
        self.send_response(status)
        if code:
            self.send_header('X-Error-Code', code)
        self.send_header('Content-Length', '0')
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server; ``root`` holds its models, ``asked`` what was asked of it."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.root, server.asked = tmp_path / 'server', []
    server.root.mkdir()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f'http://127.0.0.1:{server.server_port}'
    set_hub(
        monkeypatch,
        HF_HUB_OFFLINE=False,
        ENDPOINT=endpoint,
        HUGGINGFACE_CO_URL_TEMPLATE=endpoint + '/{repo_id}/resolve/{revision}/{filename}',
        HF_HUB_CACHE=str(tmp_path / 'cache'),
    )
    monkeypatch.setenv('MMASELECT_CACHE', str(tmp_path / 'prompts'))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def dit(hub, model_folder):
    """``me/dit``: .bin alone on its main revision, safetensors at ``refs/pr/1``, as ``facebook/DiT-XL-2-256``."""
    for revision in ('main', 'refs-pr-1'):
        shutil.copytree(model_folder('DiT'), hub.root / 'me/dit' / revision)
    weights = hub.root / 'me/dit/main/transformer/diffusion_pytorch_model.safetensors'
    torch.save(load_file(weights), weights.with_suffix('.bin'))
    weights.unlink()
    (hub.root / 'me/dit/main/model_index.json').write_text(json.dumps({'_class_name': 'DiTPipeline'}))
    return hub


def load(pretrained, type='DiT', **fields):
    return DiffusionSpec(type, pretrained=pretrained, **fields).load([QUERY])


def fetched(hub):
    return {(revision, path) for command, _, revision, path, _ in hub.asked if command == 'GET'}


@pytest.mark.parametrize(
    'pretrained,fields',
    [
        ('me/dit', {}),
        ('me/dit', dict(type='auto')),
        ('https://huggingface.co/me/dit', {}),
        ('https://huggingface.co/me/dit/tree/main', {}),
        ('hf.co/me/dit/', {}),
    ],
)
def test_bin_weights_of_the_main_revision(dit, model_folder, pretrained, fields):
    model = load(pretrained, **fields)
    assert model.family.name == 'DiT'
    assert model.identity == load(model_folder('DiT')).identity
    assert ('main', 'transformer/diffusion_pytorch_model.bin') in fetched(dit)
    # Nothing is fetched twice, and nothing is asked twice by one model.
    asked = [path for command, _, _, path, _ in dit.asked if command == 'HEAD']
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(
    'pretrained,fields',
    [
        ('me/dit@refs/pr/1', {}),
        ('me/dit', dict(revision='refs/pr/1')),
        ('https://huggingface.co/me/dit/tree/refs%2Fpr%2F1', {}),
        ('https://huggingface.co/me/dit/tree/refs%2Fpr%2F1/transformer', {}),
        ('me/dit@refs/pr/1', dict(subfolder='transformer')),
    ],
)
def test_another_revision(dit, model_folder, pretrained, fields):
    assert load(pretrained, **fields).identity == load(model_folder('DiT')).identity
    assert {revision for revision, _ in fetched(dit)} == {'refs/pr/1'}


def test_a_vae_has_a_revision_of_its_own(dit, model_folder):
    shutil.copytree(model_folder('DiT') / 'vae', dit.root / 'me/vae/ema')
    assert load('me/dit@refs/pr/1', vae='me/vae@ema').identity == load(model_folder('DiT')).identity
    with pytest.raises(InputError, match=r"vae='me/vae' is neither .*: it has no revision 'main'"):
        load('me/dit@refs/pr/1', vae='me/vae')


def test_a_single_file(hub, model_folder):
    import originals
    from conftest import TINY, make_transformer

    folder = hub.root / 'me/sd3/main'
    folder.mkdir(parents=True)
    tensors = {name: value.contiguous() for name, value in originals.sd3(make_transformer('SD3').state_dict()).items()}
    save_file(tensors, folder / 'sd3.safetensors')
    fields = dict(prompt='zeros', arch=TINY['SD3'], vae=model_folder('SD3'))
    for kind in ('blob', 'resolve'):
        model = load(f'https://huggingface.co/me/sd3/{kind}/main/sd3.safetensors?download=true', 'SD3', **fields)
        assert model.identity == load(model_folder('SD3'), 'SD3', prompt='zeros').identity


def test_token_and_cache(dit, tmp_path):
    other = tmp_path / 'other'
    load('me/dit@refs/pr/1', token='hf_secret', cache_dir=other)
    assert {token for *_, token in dit.asked} == {'Bearer hf_secret'}
    assert (other / 'models--me--dit').is_dir()
    assert not (tmp_path / 'cache').exists()
    dit.asked.clear()
    load('me/dit@refs/pr/1', cache_dir=other, local_files_only=True)
    assert not dit.asked


@pytest.mark.parametrize(
    'pretrained,said',
    [
        ('me/gated', r'it is gated: accept its licence at https://huggingface.co/me/gated, then log in .* HF_TOKEN'),
        ('me/missing', r"there is no model 'me/missing', or it is private: check the name; .* HF_TOKEN"),
        ('me/dit@nightly', r"it has no revision 'nightly'"),
        ('me/forbidden', r'the token was refused \(403\): log in with `hf auth login`, or set another HF_TOKEN'),
    ],
)
def test_what_the_hub_refuses(dit, pretrained, said):
    with pytest.raises(InputError, match=f'pretrained={pretrained!r} is neither a folder .*: {said}') as error:
        load(pretrained)
    assert '\n' not in str(error.value)


def test_a_model_without_the_files(dit):
    (dit.root / 'me/dit/main/transformer/diffusion_pytorch_model.bin').unlink()
    with pytest.raises(InputError, match=r"'me/dit' has no transformer/diffusion_pytorch_model.safetensors or .bin$"):
        load('me/dit')
    (dit.root / 'me/dit/main/transformer/config.json').unlink()
    with pytest.raises(InputError, match=r"'me/dit' has no transformer/config.json$"):
        load('me/dit')


def test_offline_it_says_what_is_cached(dit, monkeypatch):
    load('me/dit@refs/pr/1')
    DiffusionSpec('DiT', pretrained='me/dit')
    set_hub(monkeypatch, HF_HUB_OFFLINE=True)
    dit.asked.clear()
    load('me/dit@refs/pr/1')
    with pytest.raises(InputError, match=r"the cache has no revision 'nightly' of it but main, refs/pr/1, and the hub"):
        load('me/dit@nightly')
    with pytest.raises(InputError, match=r'has nothing of it, and the hub was not reached'):
        load('me/other')
    # The config was fetched, the weights were not.
    with pytest.raises(
        InputError, match=r'has no transformer/.*\.bin in the cache, which has .*transformer/config.json'
    ):
        load('me/dit')
    assert not dit.asked


def test_a_hub_that_is_down(dit, monkeypatch):
    """What is in the cache is used, and the hub is tried no more once it did not answer; of the rest it says so."""
    import huggingface_hub
    from huggingface_hub.utils import LocalEntryNotFoundError

    identity = load('me/dit').identity
    original, tried = huggingface_hub.hf_hub_download, []

    def down(*args, local_files_only, **kwargs):
        """As the client does it, but for the seconds of its attempts."""
        tried.append(not local_files_only)
        try:
            return original(*args, local_files_only=True, **kwargs)
        except LocalEntryNotFoundError as error:
            raise error from OSError('connection refused')

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', down)
    assert load('me/dit').identity == identity
    assert sum(tried) < len(tried) / 2
    with pytest.raises(
        InputError, match=r"'me/other' is neither .* and the hub was not reached \(connection refused\)"
    ):
        load('me/other')


def test_names_and_revisions(tmp_path):
    with pytest.raises(InputError, match=r"revision='a' is not that of pretrained='me/dit@b': give one of them"):
        Source('me/dit@b', revision='a')
    assert Source('me/dit@b', revision='b').revision == 'b'
    source = Source('https://huggingface.co/me/dit/tree/main/deep', subfolder='unet')
    assert (source.repository, source.revision, source.subfolder) == ('me/dit', 'main', 'deep/unet')
    for name in ('me', 'me/dit/deep', 'https://example.com/me/dit', 'me/dit@', './dit'):
        with pytest.raises(InputError, match=r'is not a folder \(a diffusers model folder or a hub id is expected\)'):
            Source(name)


def test_a_prompt_is_kept_by_revision(tmp_path, monkeypatch):
    monkeypatch.setenv('MMASELECT_CACHE', str(tmp_path))
    files = {
        default_prompt_file(Source(name, revision=revision)).relative_to(tmp_path).as_posix()
        for name, revision in (('me/sd3', None), ('me/sd3', 'v2'), ('me/sd3@v2', None), ('hf.co/me/sd3/tree/v2', None))
    }
    assert files == {'me/sd3/prompt_embeds.safetensors', 'me/sd3/v2/prompt_embeds.safetensors'}
    with pytest.raises(InputError, match=r'`python tools/encode_prompt.py me/sd3 --revision v2`'):
        load_prompt(None, Source('me/sd3@v2'), {'prompt_embeds': 8}, 77)
