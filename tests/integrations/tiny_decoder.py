"""LTX-2.5's diffusion decoder with few random weights, and its own result."""

import torch
from diffusers import LTX2VideoDiffusionDecoderModel

WINDOWS = ((3, 3, 3), (3, 5, 3), (3, 3, 3), (3, 3, 5))  # of the stages, which differ
LAST_WINDOW = (3, 5, 5)
BLOCKS = 6


def decoder():
    """Its grids have 4x5x5 to 9x5x5 tokens, each axis at least a window."""
    torch.manual_seed(0)
    model = LTX2VideoDiffusionDecoderModel(
        latent_channels=4,
        patch_size=1,
        decoder_head_dim=8,
        decoder_stage_channels=(16, 16, 16, 16, 16),
        decoder_stage_depths=(1, 1, 1, 1, 2),
        decoder_stage_kernels=WINDOWS,
        decoder_upsample_strides=((1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)),
        decoder_upsample_channel_reductions=(1, 1, 1, 1),
        decoder_stage5_kernel=LAST_WINDOW,
        decoder_t_emb_dim=8,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    # Sharp attention, so that the window matters.
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            torch.nn.init.constant_(parameter, 3.0)
    return model.eval()


def latents():
    return torch.randn(2, 4, 2, 5, 5, generator=torch.Generator("cpu").manual_seed(1))


def decode(model, **options):
    """The video, from the same noise each time."""
    noise = torch.Generator("cpu").manual_seed(2)
    return model(latents(), generator=noise, return_dict=False, **options)[0]


def attentions(model):
    stages = [block for stage in model.decoder.det_stages for block in stage]
    return [block.attn for block in (*stages, *model.decoder.diff_blocks)]
