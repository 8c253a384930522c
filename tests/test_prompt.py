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
    assert 'choose from: StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline' in error_line(
        done
    )


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


@pytest.fixture(scope='module')
def pipelines(tmp_path_factory):
    """Folders of the other kinds of pipelines, each with its text encoders and a tiny network."""
    import diffusers
    from conftest import make_vae
    from diffusion.test_more_families import FLUX, PIXART, make_network
    from diffusion.test_unet import SMALL, XL
    from diffusion.test_unet import make_network as make_unet
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from mmaselect.diffusion.families import Flux, PixArt

    root = tmp_path_factory.mktemp('pipelines')
    clip, t5, size = make_tokenizers(root / 'tokenizers')
    torch.manual_seed(0)

    def text_model(cls, width):
        return cls(
            CLIPTextConfig(
                vocab_size=size, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                projection_dim=width, eos_token_id=size - 1, bos_token_id=size - 2,
            )
        )  # fmt: skip

    def t5_model():
        return T5EncoderModel(T5Config(vocab_size=8, d_model=12, d_kv=6, d_ff=16, num_layers=2, num_heads=2))

    flow, ddim = diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.DDIMScheduler
    made = {
        'StableDiffusion': dict(
            unet=make_unet(SMALL), text_encoder=text_model(CLIPTextModel, 12), tokenizer=clip, scheduler=ddim(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ),
        'StableDiffusionXL': dict(
            unet=make_unet(XL), text_encoder=text_model(CLIPTextModel, 2), tokenizer=clip, scheduler=ddim(),
            text_encoder_2=text_model(CLIPTextModelWithProjection, 10), tokenizer_2=clip,
        ),
        'Flux': dict(
            transformer=make_network(Flux, FLUX), text_encoder=text_model(CLIPTextModel, 10), tokenizer=clip,
            text_encoder_2=t5_model(), tokenizer_2=t5, scheduler=flow,
        ),
        'PixArtSigma': dict(
            transformer=make_network(PixArt, PIXART), text_encoder=t5_model(), tokenizer=t5, scheduler=ddim()
        ),
    }  # fmt: skip
    for name, parts in made.items():
        channels = 16 if name == 'Flux' else 4
        pipeline = getattr(diffusers, f'{name}Pipeline')(vae=make_vae(channels), **parts)
        pipeline.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    'name,family,shapes',
    [
        ('StableDiffusion', 'UNet', [(1, 77, 12)]),
        ('StableDiffusionXL', 'UNet', [(1, 77, 12), (1, 10)]),
        ('Flux', 'Flux', [(1, 512, 12), (1, 10)]),
        # The tokenizer knows no such word, and gives one token; padding is left out.
        ('PixArtSigma', 'PixArt', [(1, 1, 12)]),
    ],
)
def test_other_pipelines(pipelines, name, family, shapes):
    import diffusers

    from mmaselect.diffusion.model import DiffusionSpec

    done = run_tool('encode_prompt.py', pipelines / name, '--prompt', 'a bird', '--dtype', 'float32')
    assert done.returncode == 0, done.stderr[-2000:]
    embeds = read_prompt(default_prompt_file(Source(pipelines / name), 'a bird'))
    assert [tuple(value.shape) for value in embeds.values()] == shapes
    pipeline = getattr(diffusers, f'{name}Pipeline').from_pretrained(pipelines / name)
    with torch.no_grad():
        if name == 'Flux':
            expected = pipeline.encode_prompt('a bird', None)[0]
        else:
            expected = pipeline.encode_prompt('a bird', do_classifier_free_guidance=False, **(
                dict(device='cpu', num_images_per_prompt=1) if name == 'StableDiffusion' else {}
            ))[0]  # fmt: skip
    torch.testing.assert_close(embeds['prompt_embeds'], expected[:, : shapes[0][1]])
    spec = DiffusionSpec(family, pretrained=str(pipelines / name), prompt='a bird')
    (taps,) = spec.alternatives(*((3, 'res-out') if family == 'UNet' else (2, 'output')))
    if name != 'Flux':
        assert spec.load(taps)(torch.randn(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), 100)[taps[0]].isfinite().all()
    if len(shapes) == 1:
        with pytest.raises(InputError, match='has no pooled_prompt_embeds, which this model reads'):
            load_prompt('a bird', Source(pipelines / name), WIDTHS, 333)


def test_to_leave_out_hidden_tokens_is_to_mask_them(pipelines):
    """PixArt's pipeline masks the padding of its prompt."""
    import diffusers

    from mmaselect.diffusion.model import DiffusionSpec

    run_tool('encode_prompt.py', pipelines / 'PixArtSigma', '--prompt', 'a bird', '--dtype', 'float32')
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(pipelines / 'PixArtSigma')
    latent, seen = torch.randn(2, 4, 8, 8), []
    pipeline.transformer.transformer_blocks[2].register_forward_hook(lambda _, __, output: seen.append(output))
    spec = DiffusionSpec('PixArt', pretrained=str(pipelines / 'PixArtSigma'), prompt='a bird')
    (taps,) = spec.alternatives(2, 'output')
    with torch.no_grad():
        embeds, mask, *_ = pipeline.encode_prompt('a bird', do_classifier_free_guidance=False)
        pipeline.transformer(
            latent, embeds.expand(2, -1, -1), torch.full((2,), 0.0), encoder_attention_mask=mask.expand(2, -1),
            added_cond_kwargs={'resolution': None, 'aspect_ratio': None},
        )  # fmt: skip
        maps = spec.load(taps).family(latent, 0)[taps[0]]
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), seen[0], rtol=1e-4, atol=1e-5)


def make_words():
    """A tokenizer of whole words that begins with one of its own, as Gemma's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ['<pad>', '<eos>', '<bos>', '<unk>', 'a', 'bird', 'User', 'Prompt']
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single='<bos> $A', special_tokens=[('<bos>', 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token='<pad>', eos_token='<eos>', bos_token='<bos>', unk_token='<unk>',
        model_max_length=512,
    )  # fmt: skip


def embed(folder, text='a bird'):
    """What the tool writes for a text."""
    done = run_tool('encode_prompt.py', folder, '--prompt', text, '--dtype', 'float32')
    assert done.returncode == 0, done.stderr[-2000:]
    return read_prompt(default_prompt_file(Source(folder), text), text)


@pytest.fixture(scope='module')
def sana_folder(tmp_path_factory):
    import diffusers
    from diffusion.test_sana import TINY, make_dcae, make_network
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=16, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=6, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp('sana')
    diffusers.SanaPipeline(
        tokenizer=make_words(), text_encoder=gemma, vae=make_dcae(), transformer=make_network(TINY),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_sanas_text_has_its_pipelines_instruction(sana_folder):
    """What its own ``__call__`` tells the network of a text; the padding, which it masks, is left out."""
    import diffusers

    from mmaselect.diffusion.model import DiffusionSpec

    found = embed(sana_folder)['prompt_embeds']
    pipeline = diffusers.SanaPipeline.from_pretrained(sana_folder)
    told, seen, latent = {}, [], torch.randn(1, 32, 8, 8)
    pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: told.update(kwargs), with_kwargs=True)
    pipeline.transformer.transformer_blocks[2].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        pipeline(
            'a bird', num_inference_steps=1, guidance_scale=1.0, height=32, width=32, latents=latent,
            output_type='latent', use_resolution_binning=False,
        )  # fmt: skip
        plain = pipeline.encode_prompt('a bird', do_classifier_free_guidance=False)[0][:, :2]
    mask = told['encoder_attention_mask'][0].bool()
    assert 2 < found.shape[1] == mask.sum() < 300
    torch.testing.assert_close(found, told['encoder_hidden_states'][:, mask])
    assert not torch.allclose(found[:, -2:], plain, atol=1e-3)
    spec = DiffusionSpec('Sana', pretrained=str(sana_folder), prompt='a bird')
    (taps,) = spec.alternatives(2, 'output')
    with torch.no_grad():
        maps = spec.load(taps).family(latent, told['timestep'].item())[taps[0]]
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), seen[0], rtol=1e-4, atol=1e-5)


def test_sanas_empty_prompt_is_its_unconditional_one(sana_folder):
    import diffusers

    pipeline = diffusers.SanaPipeline.from_pretrained(sana_folder)
    with torch.no_grad():
        _, _, negative, mask = pipeline.encode_prompt('a bird', negative_prompt='')
    torch.testing.assert_close(embed(sana_folder, '')['prompt_embeds'], negative[:, mask[0].bool()])


def test_lumina2s_empty_prompt_is_its_unconditional_one(chat_folders):
    import diffusers

    pipeline = diffusers.Lumina2Pipeline.from_pretrained(chat_folders / 'Lumina2')
    with torch.no_grad():
        text, _, negative, mask = pipeline.encode_prompt('', negative_prompt='')
    found = embed(chat_folders / 'Lumina2', '')['prompt_embeds']
    torch.testing.assert_close(found, negative[:, mask[0].bool()])
    assert not torch.allclose(found[:, 0], text[:, found.shape[1]], atol=1e-3)


def save_pipeline(folder, name, **parts):
    import diffusers

    getattr(diffusers, f'{name}Pipeline')(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def chat_folders(tmp_path_factory):
    """Folders of pipelines whose prompts are read by a language model, or by BERT and T5."""
    import diffusers
    import transformers as hf
    from conftest import make_vae
    from diffusion.test_autoencoders import make_flux2_vae, make_qwen_vae
    from diffusion.test_more_families import FLUX2, HUNYUAN, LUMINA2, QWEN, ZIMAGE, make_network

    from mmaselect.diffusion.families import Flux2, HunyuanDiT, Lumina2, QwenImage, ZImage

    if not Flux2.is_available():
        pytest.skip(f'these pipelines need diffusers >= {Flux2.least_diffusers}')
    root = tmp_path_factory.mktemp('chat')
    torch.manual_seed(0)
    words = make_words()
    words.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' ' + message['content'] }}{% endfor %}"
        "{% if enable_thinking is defined and enable_thinking %}{{ ' <eos>' }}{% endif %}"
    )
    text = dict(
        vocab_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    # Klein reads three of its layers, the deepest is the 27th: together they are as wide as the network expects.
    qwen3 = hf.Qwen3ForCausalLM(hf.Qwen3Config(**text, hidden_size=4, head_dim=2, num_hidden_layers=28))
    save_pipeline(
        root / 'Flux2Klein', 'Flux2Klein', transformer=make_network(Flux2, dict(FLUX2, guidance_embeds=False)),
        vae=make_flux2_vae(), text_encoder=qwen3, tokenizer=words, scheduler=flow,
    )  # fmt: skip
    qwen3 = hf.Qwen3Model(hf.Qwen3Config(**text, hidden_size=12, head_dim=6, num_hidden_layers=3))
    save_pipeline(
        root / 'ZImage', 'ZImage', transformer=make_network(ZImage, ZIMAGE), vae=make_vae(4), text_encoder=qwen3,
        tokenizer=words, scheduler=flow,
    )  # fmt: skip
    gemma = hf.Gemma2Model(hf.Gemma2Config(**text, hidden_size=12, head_dim=6, num_hidden_layers=2))
    save_pipeline(
        root / 'Lumina2', 'Lumina2', transformer=make_network(Lumina2, LUMINA2), vae=make_vae(4), text_encoder=gemma,
        tokenizer=words, scheduler=flow,
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=12)
    rope = dict(rope_type='default', mrope_section=[1, 1, 1], rope_theta=10000.0)
    qwen2 = hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=dict(text, hidden_size=12, num_hidden_layers=2, rope_parameters=rope), vision_config=vision
        )
    )
    save_pipeline(
        root / 'QwenImage', 'QwenImage', transformer=make_network(QwenImage, QWEN), vae=make_qwen_vae(),
        text_encoder=qwen2, tokenizer=words, scheduler=flow,
    )  # fmt: skip
    bert = hf.BertModel(
        hf.BertConfig(vocab_size=16, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    )
    t5 = hf.T5EncoderModel(hf.T5Config(vocab_size=16, d_model=16, d_kv=6, d_ff=16, num_layers=2, num_heads=2))
    save_pipeline(
        root / 'HunyuanDiT', 'HunyuanDiT', vae=make_vae(4), scheduler=diffusers.DDPMScheduler(), safety_checker=None,
        transformer=make_network(HunyuanDiT, dict(HUNYUAN, text_len=77, text_len_t5=256)), text_encoder=bert,
        tokenizer=words, text_encoder_2=t5, tokenizer_2=words, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return root


@pytest.mark.parametrize(
    'name,family,tap',
    [
        ('Flux2Klein', 'Flux2', (3, 'output')),
        ('ZImage', 'ZImage', (2, 'output')),
        ('QwenImage', 'QwenImage', (2, 'output')),
        ('HunyuanDiT', 'HunyuanDiT', (3, 'output')),
        ('Lumina2', 'Lumina2', (2, 'output')),
    ],
)
def test_features_are_those_of_the_pipelines_own_call(chat_folders, name, family, tap):
    """The first step of each pipeline, hooked, against the tool's embedding at the timestep of that step."""
    import diffusers

    from mmaselect.diffusion.model import DiffusionSpec
    from mmaselect.diffusion.taps import Tap

    # Qwen-Image drops the first 34 tokens, which are its template's.
    tap, text = Tap(*tap), 'a bird ' * 20 if name == 'QwenImage' else 'a bird'
    embed(chat_folders / name, text)
    pipeline = getattr(diffusers, f'{name}Pipeline').from_pretrained(chat_folders / name)
    spec = DiffusionSpec(family, pretrained=str(chat_folders / name), prompt=text)
    # Gemma's padding is not read: to leave it out is the same.
    site, seen, told = spec.family.catalogue(pipeline.transformer)[tap], [], {}
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: told.update(kwargs, args=args), with_kwargs=True
    )
    pipeline.transformer.get_submodule(site.module).register_forward_hook(
        lambda _, __, output: seen.append(site.pick(output))
    )
    latent = torch.randn(1, spec.family.latent_channels(spec.config), 8, 8, generator=torch.Generator().manual_seed(1))
    more = dict(guidance_scale=0.0, latents=latent)
    if name == 'QwenImage':
        more = dict(true_cfg_scale=1.0, latents=pipeline._pack_latents(latent, 1, 4, 8, 8))
    if name == 'HunyuanDiT':
        more['use_resolution_binning'] = False
    size, timestep = 8 * spec.factor, 0 if name == 'HunyuanDiT' else 1000
    with torch.no_grad():
        pipeline(prompt=text, num_inference_steps=1, height=size, width=size, output_type='latent', **more)
        model = spec.load([tap]).family
        maps = model(latent, timestep)[tap]
        zeros = DiffusionSpec(family, pretrained=str(chat_folders / name), prompt='zeros').load([tap]).family
        assert not torch.allclose(zeros(latent, timestep)[tap], maps, atol=1e-3)
    time = told['args'][1] if name in ('ZImage', 'HunyuanDiT') else told['timestep']
    assert model.time(timestep) == pytest.approx(time.item())
    tokens = seen[0][:, :16] if name == 'ZImage' else seen[0][:, -maps[0, 0].numel() :]
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-5)
