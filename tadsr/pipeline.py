"""The one-step super-resolution pipeline: diffusers' networks, loaded, changed and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from tadsr.call_habits import answers_loading
from tadsr.checkpoints import load_checkpoint, save_native
from tadsr.checkpoints.card import model_card
from tadsr.checkpoints.hub import publish
from tadsr.checkpoints.lora_files import read_lora
from tadsr.diffusers_habits import DiffusersHabits
from tadsr.machine import check_device
from tadsr.networks.adapter_targets import AdapterSet
from tadsr.networks.adapters import extract_adapters, fuse_adapters, has_adapters, merge_lora
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.onestep import EngineName, OneStepEngine
from tadsr.prompts import check_taggable
from tadsr.quiet import quiet_libraries
from tadsr.restorer import Restorer
from tadsr.schedule import make_alphas_cumprod

if TYPE_CHECKING:
    from typing_extensions import Self


class TADSRPipeline(DiffusersHabits, Restorer, DiffusionPipeline):
    """Restore and enlarge photographs in one diffusion step, with a timestep as the knob.

    Threads may share a pipeline: one at a time uses the networks, while the others decode and
    encode images.

    Args:
        vae: Time-aware autoencoder.
        unet: One-step student.
        scheduler: Any diffusers scheduler; only its betas are read.
        text_encoder: CLIP text model, or None where `prompt_embeddings` is given.
        tokenizer: Tokenizer of `text_encoder`.
        prompt_embeddings: Embeddings carried as tensors, used when there is no text encoder.
        tadsr_metadata: Facts that travel with the weights, such as "default_timestep".

    Raises:
        ValueError: Neither a text encoder with tokenizer nor prompt embeddings are given, or the
            scheduler does not predict noise.

    Source: TADSR (arXiv 2508.16557).
    """

    model_cpu_offload_seq = "text_encoder->prompt_embeddings->vae->unet"
    _optional_components = ("text_encoder", "tokenizer", "prompt_embeddings")

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Answer who gives a model's name where its networks belong."""
        if arguments and isinstance(arguments[0], str | Path):
            raise TypeError(f"load a model by from_pretrained({str(arguments[0])!r})")
        return super().__new__(cls)

    def __init__(
        self,
        vae: TimeAwareAutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder: Any = None,
        tokenizer: Any = None,
        prompt_embeddings: PromptEmbeddings | None = None,
        tadsr_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if prompt_embeddings is None and (text_encoder is None or tokenizer is None):
            raise ValueError(
                "a pipeline must have a text_encoder with its tokenizer, or prompt_embeddings; "
                "got neither"
            )
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if prediction_type != "epsilon":
            raise ValueError(
                f"the scheduler's prediction_type must be 'epsilon', got {prediction_type!r}; "
                "use weights based on stable-diffusion-2-1-base, not on the 768 px model"
            )
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            prompt_embeddings=prompt_embeddings,
        )
        config = scheduler.config
        alphas_cumprod = make_alphas_cumprod(
            config.beta_start, config.beta_end, config.beta_schedule, config.num_train_timesteps
        )
        self._prepare(OneStepEngine(vae, unet, alphas_cumprod), tadsr_metadata)

    @classmethod
    @answers_loading
    @torch.inference_mode(False)  # weights made in a caller's mode could not be trained
    def from_pretrained(
        cls,
        source: str | Path = "tadsr-tiny",
        *,
        adapter: str | Path | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | Literal["auto"] | None = None,
        merge_adapters: bool = True,
        tagger: str | Path | Callable[[Any], str] | None = None,
        engine: EngineName = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:
        """Load a pipeline from the package, a folder or a hub repository.

        Args:
            source: "tadsr-tiny" (inside the package), a folder in the native or the published
                format, or a hub id such as "owner/name".
            adapter: Published `tadsr.pkl`, when it does not lie in the base folder.
            variant: Variant of the weight files, such as "fp16".
            torch_dtype: Type of the weights in memory; None for float32. "auto" is float32 until
                the pipeline moves to CUDA, where it becomes float16; on a CPU that is measured to
                be faster so, the fused engine multiplies in bfloat16.
            merge_adapters: Whether LoRA matrices are added into the weights; False keeps them
                apart as PEFT layers (slower, for training and conversion).
            tagger: What describes each image, before the user's prompt: a callable from a PIL
                image to a text, "module:name" for one, "dape" for the published tagger beside the
                checkpoint, "ram" for the same without its adapter, or a folder or hub id that
                holds it. None leaves the user's prompt alone. `prompt_style` of the pipeline says
                how the two are joined.
            engine: How the networks are run; see `set_engine`.
            revision: Branch, tag or commit on the hub.
            cache_dir: Folder for downloads instead of huggingface-hub's own.
            local_files_only: Use only what is already downloaded.
            token: Hub token for private repositories.

        Returns:
            The pipeline on the CPU, in evaluation mode.

        Raises:
            CheckpointError: The checkpoint is missing, damaged, unsafe or does not fit.
            ValueError: A tagger is given, but the model has no text encoder to read its prompts.
        """
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        checkpoint = load_checkpoint(
            source,
            adapter=adapter,
            variant=variant,
            torch_dtype=None if torch_dtype == "auto" else torch_dtype,
            merge_adapters=merge_adapters,
            **hub,
        )
        pipe = cls(
            vae=checkpoint.vae,
            unet=checkpoint.unet,
            scheduler=checkpoint.scheduler,
            text_encoder=checkpoint.text_encoder,
            tokenizer=checkpoint.tokenizer,
            prompt_embeddings=checkpoint.prompt_embeddings,
            tadsr_metadata=checkpoint.metadata,
        )
        pipe._engine.mixes = torch_dtype == "auto"
        pipe.set_engine(engine)
        if tagger is not None:
            # Only here: it brings further networks with it.
            from tadsr.checkpoints.tagger import open_tagger

            check_taggable(pipe.text_encoder)
            pipe.tagger = open_tagger(tagger, source, **hub)
        return pipe

    @property
    def _execution_device(self) -> torch.device:
        # As diffusers finds it, which looks for hooks in every module seven times over; there are
        # nearly always none.
        names = ("vae", "unet", "text_encoder", "prompt_embeddings")
        found = (getattr(self, name, None) for name in names)
        networks = [part for part in found if isinstance(part, torch.nn.Module)]
        waiting = list(networks)
        while waiting:
            module = waiting.pop()
            if module is not None:
                if not module.__dict__.keys().isdisjoint(("_hf_hook", "_diffusers_hook")):
                    return super()._execution_device
                waiting += module._modules.values()
        devices = [next(chain(n.parameters(), n.buffers())).device for n in networks]
        return next((d for d in devices if d.type not in ("cpu", "meta")), devices[0])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the networks as diffusers does; a tagger that is a network goes along.

        Raises:
            TADSRError: The device is none that this machine has.
        """
        if unknown := kwargs.keys() - {"device", "dtype", "silence_dtype_warnings"}:
            raise TypeError(f"to() must get device= and dtype=, got {', '.join(unknown)}=")
        for value in (*args, kwargs.get("device")):
            if isinstance(value, str | int | torch.device):
                check_device(value)
        has_type = any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
        with quiet_libraries():
            moved = super().to(*args, **kwargs)
            if self._engine.mixes and not has_type and self.device.type == "cuda":
                super().to(torch.float16)
        if has_type and self._engine.mixes:
            self._engine.mixes = False  # who names a type wants no other
            self._engine.release()
        if isinstance(self.tagger, torch.nn.Module):
            getattr(self.tagger, "to_device", self.tagger.to)(self.device)
        return moved

    @answers_loading
    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the pipeline as a diffusers folder of safetensors, all or nothing.

        Args:
            save_directory: Folder to create.
            variant: Variant in the weight files' names, such as "fp16".
            torch_dtype: Type the weights are written in; None for their own.
            overwrite: Whether an existing folder is replaced.

        Raises:
            CheckpointError: The folder exists or cannot be written, or a network is missing.
        """
        save_native(
            save_directory,
            **self.components,
            metadata=self.metadata,
            variant=variant,
            dtype=torch_dtype,
            overwrite=overwrite,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        torch_dtype: torch.dtype | None = None,
        card: str | None = None,
    ) -> str:
        """Publish the pipeline on the hub with a model card, in one commit.

        Args:
            repo_id: "owner/name"; made if it is new.
            private: Whether a new repository is private; None for the owner's default.
            revision: Branch that exists; None for the main one.
            commit_message: None for a plain one.
            token: Access token that may write; None for the stored one.
            torch_dtype: Type the weights are written in; None for their own.
            card: README.md; None for one made from what is known, its licence included.

        Returns:
            The commit's address.

        Raises:
            CheckpointError: The hub refuses or cannot be reached, or the weights cannot be saved.
        """
        networks = {n: m for n, m in self.components.items() if isinstance(m, torch.nn.Module)}
        known = None if self.prompt_embeddings is None else self.prompt_embeddings.config.prompts
        card = card or model_card(
            repo_id,
            num_parameters={n: sum(p.numel() for p in m.parameters()) for n, m in networks.items()},
            prompts="any" if self.text_encoder is not None else f"only {list(known)}",
            metadata=self.metadata,
        )
        write = partial(
            save_native,
            **self.components,
            metadata=self.metadata,
            dtype=torch_dtype,
            card=card,
        )
        return publish(
            repo_id,
            write,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
        )

    @property
    def adapters(self) -> AdapterSet | None:
        """The LoRA adapters kept apart from the weights, or None when merged."""
        return extract_adapters(self.unet, self.vae) if has_adapters(self.unet) else None

    def merge_adapters(self) -> None:
        """Add adapters that were kept apart into the weights; the result stays the same."""
        fuse_adapters(self.unet, self.vae)

    def merge_lora(self, source: str | Path, *, scale: float = 1.0) -> None:
        """Add another LoRA to the weights, for good: a style, a subject, a kind of picture.

        Adapters that are kept apart stay so. To be without it again, load the model anew, or
        merge it a second time with the negative `scale`, which undoes it within rounding.

        Args:
            source: A .safetensors file or a folder, of diffusers or PEFT, for the base model.
            scale: Its strength; 1 is as trained.

        Raises:
            CheckpointError: It is missing, damaged, or does not fit; nothing is changed then.
        """
        products = read_lora(source, self.unet, self.text_encoder)
        merge_lora(self.unet, products["unet"], scale)
        if self.text_encoder is not None:
            merge_lora(self.text_encoder, products["text_encoder"], scale)
        self._text_embeddings.clear()
