"""tools/encode_prompt.py against a Stable Diffusion 3 pipeline whose text encoders are made on the spot."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import error_line, run_tool

from mmaselect.diffusion.conditioning import default_prompt_file, load_prompt, read_prompt
from mmaselect.diffusion.families import SD3
from mmaselect.diffusion.loading import Source
from mmaselect.errors import InputError

WIDTHS = {'prompt_embeds': 32, 'pooled_prompt_embeds': 24}


def make_tokenizers(folder):
    from tokenizers import Tokenizer, models
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord('a'), ord('z') + 1)]
    words = [*letters, *(letter + '</w>' for letter in letters), '<|startoftext|>', '<|endoftext|>']
    vocab = {word: index for index, word in enumerate(words)}
    (folder / 'clip').mkdir(parents=True)
    (folder / 'clip' / 'vocab.json').write_text(json.dumps(vocab))
    (folder / 'clip' / 'merges.txt').write_text('#version: 0.2\n')
    clip = CLIPTokenizer(str(folder / 'clip' / 'vocab.json'), str(folder / 'clip' / 'merges.txt'), model_max_length=77)
    unigram = Tokenizer(models.WordLevel({'<pad>': 0, '</s>': 1, '<unk>': 2, 'a': 3, 'bird': 4}, unk_token='<unk>'))
    t5 = PreTrainedTokenizerFast(
        tokenizer_object=unigram, pad_token='<pad>', eos_token='</s>', unk_token='<unk>', model_max_length=512
    )
    return clip, t5, len(vocab)


@pytest.fixture(scope='module')
def pipeline_folder(tmp_path_factory):
    from conftest import make_transformer, make_vae
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp('pipeline')
    clip, t5, size = make_tokenizers(folder / 'tokenizers')
    torch.manual_seed(0)

    def text_model(width):
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=size,
                hidden_size=width,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=width,
                eos_token_id=size - 1,
                bos_token_id=size - 2,
            )
        )

    # CLIP widths 8 + 16 give the pooled 24 of the tiny transformer, T5 its joint width of 32.
    encoder_3 = T5EncoderModel(T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=2, num_heads=4))
    StableDiffusion3Pipeline(
        transformer=make_transformer('SD3'),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(16),
        text_encoder=text_model(8),
        tokenizer=clip,
        text_encoder_2=text_model(16),
        tokenizer_2=clip,
        text_encoder_3=encoder_3,
        tokenizer_3=t5,
    ).save_pretrained(folder / 'model')
    return folder / 'model'


def test_the_tool_writes_what_the_pipeline_computes(pipeline_folder):
    from diffusers import StableDiffusion3Pipeline

    done = run_tool('encode_prompt.py', pipeline_folder, '--prompt', 'a bird', '--dtype', 'float32')
    assert done.returncode == 0, done.stderr
    source = Source(pipeline_folder)
    embeds = load_prompt('a bird', source, WIDTHS, 333)
    # Another text is another file: that of the default, the empty prompt, is not there yet.
    with pytest.raises(InputError, match=r'has no .*prompt_embeds.safetensors; write it with .*encode_prompt.py'):
        load_prompt(None, source, WIDTHS, 333)
    with pytest.raises(InputError, match=r"has no .*; write it with .* --prompt 'it.*s a bird'"):
        load_prompt("it's a bird", source, WIDTHS, 333)
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    with torch.no_grad():
        expected, _, pooled, _ = pipeline.encode_prompt('a bird', None, None, do_classifier_free_guidance=False)
    assert expected.shape == (1, SD3.prompt_tokens, 32)
    torch.testing.assert_close(embeds['prompt_embeds'], expected)
    torch.testing.assert_close(embeds['pooled_prompt_embeds'], pooled)
    assert not torch.allclose(expected, torch.zeros_like(expected))


def test_a_folder_that_is_no_pipeline_is_refused(model_folder, call_tool):
    done = call_tool('encode_prompt.py', model_folder('DiT'), '/nowhere/out.safetensors')
    assert 'a StableDiffusion3Pipeline is expected' in error_line(done)


def test_prompt_files(tmp_path, model_folder, caplog):
    source = Source(model_folder('SD3'))
    with caplog.at_level('INFO', logger='mmaselect'):
        assert load_prompt('zeros', source, WIDTHS, 333)['prompt_embeds'].abs().sum() == 0
    assert 'constant prompt: zeros' in caplog.text
    with caplog.at_level('INFO', logger='mmaselect'):
        assert load_prompt(None, source, WIDTHS, 333)['prompt_embeds'].shape == (1, 5, 32)
    assert "constant prompt: '', from" in caplog.text
    with pytest.raises(InputError, match=r"has no .*prompt_embeds.safetensors; write it with .*set prompt='zeros'"):
        load_prompt(None, Source(tmp_path), WIDTHS, 333)
    with pytest.raises(InputError, match='a model with random weights knows no text'):
        load_prompt('a bird', None, WIDTHS, 333)
    with pytest.raises(InputError, match=r'prompt=7 is not valid: give a text'):
        load_prompt(7, source, WIDTHS, 333)
    shutil.copy(default_prompt_file(source), default_prompt_file(Source(tmp_path), 'a bird'))
    with pytest.raises(InputError, match=r"holds the embedding of '', not of prompt='a bird'"):
        load_prompt('a bird', Source(tmp_path), WIDTHS, 333)
    with pytest.raises(InputError, match=r"prompt='nothing.safetensors' is not a file"):
        load_prompt('nothing.safetensors', source, WIDTHS, 333)
    (tmp_path / 'bad.safetensors').write_bytes(b'\x00' * 64)
    with pytest.raises(InputError, match=r'is not a file made by tools/encode_prompt.py'):
        read_prompt(tmp_path / 'bad.safetensors')
