"""Real diffusers autoencoders with random weights, image and video."""

from typing import Any

import diffusers as installed
import torch

diffusers: Any = installed
"""Its signatures are those of one default model each; tiny ones have other tuples."""


def kl() -> Any:
    """4 pixels to a latent of 4 channels, each frame by itself."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3,
        shift_factor=0.1,
    )


def tiny() -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=5,
    )


def wan() -> Any:
    """8 pixels and 4 frames (after the first) to a latent of 3 channels."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=3,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3],
        latents_std=[2.0, 1.5, 0.5],
    )


def cogvideox() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def ltx(**changes: Any) -> Any:
    """8 pixels and 8 frames (after the first) to a latent of 8 channels; its mean and deviation are buffers."""
    model = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=1,
        **changes,
    )
    model.latents_mean.copy_(torch.linspace(-0.3, 0.4, 8))
    model.latents_std.copy_(torch.linspace(0.5, 2.0, 8))
    return model
