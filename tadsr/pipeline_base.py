"""The step on tensors and prompts, for whatever holds the networks; imports no diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tadsr.conditioning import TimestepField, read_timesteps, run_at
from tadsr.config import PAPER_PROCESS_SIZE
from tadsr.errors import TADSRError
from tadsr.locks import NetworkLock
from tadsr.onestep import EngineName, EnginePlan, OneStepEngine
from tadsr.prompts import Prompts, PromptStyle, TextEmbeddings, embed_texts

PAPER_TIMESTEP = 500


class OneStepPipeline:
    """Run a student's networks on tensors; `Restorer` adds images.

    Attributes:
        alphas_cumprod: ᾱ, (T,).
        tagger: Describes images before the user's prompt; None for none.
        prompt_style: How a tagger's words and the prompt are joined.
        metadata: Facts that travel with the weights, such as "license".
    """

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    prompt_embeddings: Any
    _execution_device: torch.device
    maybe_free_model_hooks: Callable[[], None]

    def _prepare(self, engine: OneStepEngine, metadata: Mapping[str, Any] | None) -> None:
        """Set what there is beside the networks, once an engine has them."""
        self.alphas_cumprod = engine.alphas_cumprod
        self._lock = NetworkLock()
        self._text_embeddings = TextEmbeddings()
        self._engine = engine
        self.tagger: Callable[[Any], str] | None = None
        self.prompt_style: PromptStyle = "published"
        self.metadata: Mapping[str, Any] = metadata or {}

    @property
    def default_timestep(self) -> int:
        """The timestep where none is named: the one stored with the model, else the paper's."""
        return self.metadata.get("default_timestep", PAPER_TIMESTEP)

    @property
    def default_process_size(self) -> int:
        """The `process_size` where none is named: the one stored with the model, else 512 px."""
        return self.metadata.get("default_process_size", PAPER_PROCESS_SIZE)

    @property
    def engine(self) -> OneStepEngine:
        """The engine of the networks that the pipeline holds now."""
        engine = self._engine
        if engine.vae is not self.vae or engine.unet is not self.unet:
            self._engine = engine.chosen(self.vae, self.unet)
        return self._engine

    def set_engine(self, engine: EngineName | EnginePlan) -> None:
        """Choose how the networks are run; the result is the same.

        Args:
            engine: "fused" (tadsr's own forward with fused kernels, folded weights and, on CUDA,
                recorded graphs), "eager" (diffusers' modules as they are), "compile"
                (torch.compile on them, slow at every new size), "openvino" (float32 weights on a
                CPU, through graphs that are made at first use and kept in the cache folder), or
                "auto", the fastest that runs the model without compiling. An `EnginePlan` is
                "fused" with these switches.

        Raises:
            ValueError: `engine` is none of these.
            TADSRError: OpenVINO is not installed.
        """
        chosen = self._engine.chosen(self.vae, self.unet, engine)
        with self._lock:
            self._engine.release()
            self._engine = chosen

    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """Return the embeddings of prompts; recent ones are cached.

        Args:
            prompts: B texts, or one.

        Returns:
            (B, L, D), on the execution device.

        Raises:
            TypeError: A prompt is not a string.
            ValueError: The model has no text encoder and does not know a prompt.
        """
        return self._embed([prompts] if isinstance(prompts, str) else prompts).embeds

    def _embed(self, texts: Sequence[str], device: torch.device | None = None) -> Prompts:
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"prompt must be text, got {type(text).__name__}")
        if device is None:
            device = self._execution_device
        if self.prompt_embeddings is None:
            self._check_part("text_encoder")
        network = self.prompt_embeddings if self.text_encoder is None else self.text_encoder

        def embed(texts: list[str]) -> Tensor:
            if self.text_encoder is None:
                return self.prompt_embeddings(texts).to(device)
            return embed_texts(self.text_encoder, self.tokenizer, device, texts)

        with self._lock:
            return self._text_embeddings.of(texts, network, embed, device)

    def _check_part(self, name: str) -> None:
        if getattr(self, name) is None:
            raise TADSRError(f"{name} must be a network, got None; assign one, or load them anew")

    @property
    def _last_timestep(self) -> int:
        return len(self.alphas_cumprod) - 1

    def check_timesteps(self, timestep: int | Sequence[int], num_images: int) -> Tensor:
        """Turn a user's timestep into one int64 per image, (B,), on the execution device.

        Raises:
            TypeError: A timestep is not a number.
            ValueError: A timestep is not whole or out of range, or their number is wrong.
        """
        whole = read_timesteps(timestep, num_images, self._last_timestep)
        return torch.tensor(whole, dtype=torch.int64, device=self._execution_device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(
        self,
        lq: Tensor,
        timesteps: Tensor | Sequence[int] | TimestepField,
        prompt_embeds: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Restore tensors in one step, without resizing or colour fix.

        Args:
            lq: LQ images at output resolution, (B, 3, H, W), in [-1, 1]; H and W multiples of
                `vae.downscale_factor`.
            timesteps: One timestep per image, or a map per image.
            prompt_embeds: Prompt embeddings, (B, L, D).
            generator: Samples the posterior; None takes its mean.

        Returns:
            Restored images, shaped as `lq`, clamped to [-1, 1], in the autoencoder's dtype.

        Source: TADSR (arXiv 2508.16557), one-step inference.
        """
        if isinstance(timesteps, Tensor):
            timesteps = timesteps.tolist()
        with self._lock:
            results = run_at(
                timesteps,
                lambda knot: self.engine.restore(lq, knot, prompt_embeds, generator=generator),
                generator,
            )
        is_map = isinstance(timesteps, TimestepField)
        return timesteps.mix(results, tuple(lq.shape[-2:])) if is_map else results[0]

    def encode_latents(
        self, lq: Tensor, timesteps: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Encode LQ images (B, 3, H, W) to scaled latents (B, C, H/f, W/f) at their timesteps."""
        with self._lock:
            return self.engine.encode(lq, timesteps, generator=generator)

    def predict_x0(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Take the student's one step on scaled latents (B, C, h, w)."""
        with self._lock:
            return self.engine.predict_x0(latents, timesteps, prompt_embeds)

    def decode_latents(self, pred_x0: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), clamped to [-1, 1].

        Raises:
            TADSRError: The result is not finite.
        """
        with self._lock:
            return self.engine.decode(pred_x0)
