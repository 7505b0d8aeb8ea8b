"""Tiny random models of eleven families of video-language models, and real video inputs for them.

`build(family)` makes the model, `video_inputs(family)` a batch of moving squares as that family's own video (or image) processor
prepares it. Tokenizers do not exist offline, so ids are made by hand: video tokens in the right number, text around them.
"""
from functools import cache

import torch
from transformers import (CONFIG_MAPPING, AutoModelForImageTextToText, InstructBlipVideoForConditionalGeneration,
                          Qwen2_5OmniThinkerForConditionalGeneration)

IMAGE, VIDEO, START, END, AUDIO, AUDIO_START, AUDIO_END, VOCAB = 90, 91, 92, 93, 94, 95, 96, 128
SIZE, FRAMES = 56, 4                                    # pixels and frames of a clip, if nothing else is asked for
FAMILIES = ("smolvlm", "idefics", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3", "video_llava", "llava_onevision", "internvl",
            "instructblipvideo", "qwen2_5_omni")
_TEXT = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=VOCAB,
             bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=512)
_VISION = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=14)
_ROPE = dict(rope_type="default", mrope_section=[4, 6, 6], rope_theta=10000.)
_QWEN = dict(depth=2, hidden_size=64, intermediate_size=64, num_heads=2, patch_size=14, out_hidden_size=64)
_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


def _smolvlm():
    return dict(text_config=dict(model_type="llama", **_TEXT), vision_config=_VISION, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)


def _idefics():
    text = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
    vision = dict(embed_dim=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=14)
    perceiver = dict(use_resampler=True, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=32)
    return dict(**text, vision_config=vision, perceiver_config=perceiver, use_resampler=True,
                alpha_initializer="ones", freeze_text_layers=False, freeze_vision_layers=False)


def _qwen2_vl():
    vision = dict(depth=2, embed_dim=64, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=14)
    return dict(text_config=dict(**_TEXT, rope_parameters=_ROPE), vision_config=vision, **_IDS)


def _qwen2_5_vl(): return dict(text_config=dict(**_TEXT, rope_parameters=_ROPE), vision_config=dict(**_QWEN, window_size=28, fullatt_block_indexes=[1]), **_IDS)


def _qwen3_vl():
    text = dict(**_TEXT, head_dim=32, rope_parameters=_ROPE | {"mrope_interleaved": True})
    return dict(text_config=text, vision_config=dict(**_QWEN | {"patch_size": 16}, deepstack_visual_indexes=[0], num_position_embeddings=16), **_IDS)


def _video_llama_3():
    return dict(text_config=dict(model_type="qwen2", **_TEXT), vision_config={k: v for k, v in _VISION.items() if k != "image_size"},
                image_token_id=IMAGE, video_token_id=VIDEO)


def _video_llava():
    return dict(text_config=dict(model_type="llama", **_TEXT), vision_config=dict(model_type="clip_vision_model", **_VISION),
                image_token_index=IMAGE, video_token_index=VIDEO)


def _llava_onevision():
    vision = dict(model_type="siglip_vision_model", vision_use_head=False, **_VISION)
    return dict(text_config=dict(model_type="qwen2", **_TEXT), vision_config=vision, image_token_index=IMAGE, video_token_index=VIDEO)


def _internvl():
    return dict(text_config=dict(model_type="qwen2", **_TEXT), vision_config=_VISION, image_token_id=IMAGE, image_seq_length=4)


def _instructblipvideo():
    qformer = dict(vocab_size=VOCAB, hidden_dropout_prob=0., attention_probs_dropout_prob=0., hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    text = dict(model_type="opt", hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=64,
                vocab_size=VOCAB, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, dropout=0.)
    return dict(text_config=text, vision_config=_VISION | {"initializer_range": .02}, qformer_config=qformer, num_query_tokens=4, video_token_index=VIDEO)


def _qwen2_5_omni():
    audio = dict(d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=16, max_source_positions=100,
                 n_window=10, dropout=0., output_dim=64)
    return dict(text_config=dict(**_TEXT, rope_parameters=_ROPE), vision_config=dict(**_QWEN, window_size=28, fullatt_block_indexes=[1]),
                audio_config=audio, image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=AUDIO, vision_start_token_id=START,
                vision_end_token_id=END, audio_start_token_id=AUDIO_START, audio_end_token_id=AUDIO_END)


def config(family:str):
    "The tiny configuration of a family."
    return CONFIG_MAPPING["qwen2_5_omni_thinker" if family == "qwen2_5_omni" else family](**globals()[f"_{family}"]())


def build(family:str, seed:int=0):
    "A tiny model with random weights, in eval mode."
    torch.manual_seed(seed)
    own = {"instructblipvideo": InstructBlipVideoForConditionalGeneration, "qwen2_5_omni": Qwen2_5OmniThinkerForConditionalGeneration}
    c = config(family)
    return (own[family](c) if family in own else AutoModelForImageTextToText.from_config(c)).eval()


def videos(batch:int=1, frames:int=FRAMES, size:int=SIZE, seed:int=0) -> list[torch.Tensor]:
    "`batch` clips (frames, 3, size, size), uint8: a square that moves over a still, noisy background."
    g = torch.Generator().manual_seed(seed)
    clips = torch.randint(0, 80, (batch, 1, 3, size, size), dtype=torch.uint8, generator=g).repeat(1, frames, 1, 1, 1)
    for b in range(batch):
        for t in range(frames): clips[b, t, (b + t) % 3, 4:24, 8*t % (size - 20):8*t % (size - 20) + 20] = 250
    return list(clips)


@cache
def processor(family:str):
    "The video processor of the family, or where it has none (idefics, Video-LLaMA's elders) its image processor."
    from transformers import (IdeficsImageProcessor, InstructBlipVideoVideoProcessor, InternVLVideoProcessor, LlavaOnevisionVideoProcessor,
                              Qwen2VLVideoProcessor, Qwen3VLVideoProcessor, SmolVLMVideoProcessor, VideoLlama3VideoProcessor, VideoLlavaVideoProcessor)
    square = dict(size=dict(height=SIZE, width=SIZE))
    pixels = dict(size=dict(shortest_edge=28*28, longest_edge=SIZE*SIZE*64))
    return {
        "smolvlm": lambda: SmolVLMVideoProcessor(size=dict(longest_edge=SIZE), max_image_size=dict(longest_edge=SIZE)),
        "idefics": lambda: IdeficsImageProcessor(image_size=SIZE),
        "qwen3_vl": lambda: Qwen3VLVideoProcessor(**pixels),
        "video_llama_3": lambda: VideoLlama3VideoProcessor(patch_size=14, **pixels),
        "video_llava": lambda: VideoLlavaVideoProcessor(size=dict(shortest_edge=SIZE), crop_size=dict(height=SIZE, width=SIZE)),
        "llava_onevision": lambda: LlavaOnevisionVideoProcessor(**square),
        "internvl": lambda: InternVLVideoProcessor(**square),
        "instructblipvideo": lambda: InstructBlipVideoVideoProcessor(**square),
    }.get(family, lambda: Qwen2VLVideoProcessor(**pixels))()


def _pixels(family:str, clips) -> dict:
    "What the family's processor makes of the clips."
    if family == "idefics":
        frames = [[f.permute(1, 2, 0).numpy() for f in clip] for clip in clips]
        return {"pixel_values": torch.stack([processor(family)(f, return_tensors="pt") for f in frames])}
    meta = [dict(total_num_frames=len(c), fps=1., duration=float(len(c)), frames_indices=list(range(len(c)))) for c in clips]
    out = dict(processor(family)(list(clips), return_tensors="pt", do_sample_frames=False, video_metadata=meta))
    return {k: v for k, v in out.items() if isinstance(v, torch.Tensor)}


def _frame_tokens(family:str, pixels:dict, b:int, frames:int) -> list[list[int]]:
    "Video tokens of clip b: a list per (temporal patch of) frame(s), in the order of the prompt."
    if family in ("smolvlm", "internvl"): return [[IMAGE]*4]*frames
    if family == "idefics": return [[IMAGE]]*frames
    if family == "instructblipvideo": return [[VIDEO]*4]*frames
    if family == "video_llava": return [[VIDEO]*17]*frames
    if family == "llava_onevision": return [[VIDEO]*4]*frames + [[VIDEO]]                    # a newline token ends the clip
    t, h, w = pixels["video_grid_thw"][b].tolist()
    merge = int(pixels["video_merge_sizes"][b]) if family == "video_llama_3" else 2
    if family != "video_llama_3": return [[VIDEO]*(h*w//merge**2)]*t
    before = int((pixels["video_grid_thw"][:b].prod(1)//pixels["video_merge_sizes"][:b]**2).sum())
    return [[VIDEO]*int(m.sum()) for m in pixels["video_compression_mask"][before:before + t*h*w//merge**2].view(t, -1)]


def _row(family:str, tokens:list[list[int]], text:list[int], audio:int=0) -> list[int]:
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni"): tokens = [[START], *tokens, [END]]
    if family == "qwen3_vl": tokens = [[5, START, *t, END] for t in tokens]                # time stamps between the frames
    if family in ("smolvlm", "video_llama_3", "internvl"): tokens = [[5 + i, *t] for i, t in enumerate(tokens)]
    sound = [AUDIO_START, *[AUDIO]*audio, AUDIO_END] if audio else []
    return [1, *sum(tokens, []), *sound, *text]


def video_inputs(family:str, clips=None, text=(10, 11, 12, 13), seed:int=0, sound:bool=True) -> dict:
    """Inputs of the family's model for clips (default: two), with labels on the text. Rows of unequal length are padded on the left;
    families that stack frames need clips of equal length. `sound`: for the family that hears."""
    clips = videos(2, seed=seed) if clips is None else clips
    pixels = _pixels(family, clips)
    audio = {}
    if family == "qwen2_5_omni" and sound:
        audio = dict(input_features=torch.randn(len(clips), 16, 40, generator=torch.Generator().manual_seed(seed)),
                     feature_attention_mask=torch.ones(len(clips), 40, dtype=torch.long))
    rows = [_row(family, _frame_tokens(family, pixels, b, len(c)), list(text), 10 if audio else 0) for b, c in enumerate(clips)]
    longest = max(map(len, rows))
    ids = torch.tensor([[0]*(longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0]*(longest - len(r)) + [1]*len(r) for r in rows])
    labels = torch.full_like(ids, -100)
    labels[:, -len(text):] = ids[:, -len(text):]
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels, **pixels, **audio)
    if family == "internvl": batch["pixel_values"] = batch.pop("pixel_values_videos").flatten(0, 1)
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"): batch["mm_token_type_ids"] = 2*(ids == VIDEO).int()
    if family == "qwen2_5_omni": batch["video_second_per_grid"] = torch.ones(len(clips))
    if family == "instructblipvideo": batch["qformer_input_ids"] = torch.tensor([[3, 4, 5]]*len(clips))
    if family == "idefics":
        seen = (ids == IMAGE).cumsum(1)
        batch["image_attention_mask"] = (seen[..., None] > torch.arange(len(clips[0]))).long()
    return batch
