"""Results of the attention meter, and the shares that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keepsight.diagnose.instruments.layout import VisualLayout


@dataclass(frozen=True)
class AttentionTrace:
    """What one generation looked at. S measured steps, L metered layers, B rows, H heads.

    Attributes:
        layers: [L] int64, indices of the metered decoder layers.
        steps: [S] int64, t of each measurement: tokens generated before it (0 is the prompt's last position). The
            positions of VisMem's memories count.
        text_tokens: [S, B] int64, text keys that a head could see.
        visual_tokens: [B] int64, visual keys.
        edge_tokens: [B] int64, visual keys on the border of their image (0 where the grid is unknown).
        log_visual, log_text, log_first, log_edge, log_memory: [S, L, B, H] float32, log-sum-exp of the scores over the
            visual keys, all text keys, the sequence's first token alone (the usual attention sink; part of text or of
            the image, wherever it stands), the visual keys on image borders (where vision encoders put theirs) and the
            latents of VisMem's memories (part of text; -inf while there are none).
        layouts: B layouts of the visual tokens.
        where: [S, M] float32, mass on each visual token of row 0, mean over metered layers and heads; None unless the
            meter was asked for it.
    """

    layers: np.ndarray
    steps: np.ndarray
    text_tokens: np.ndarray
    visual_tokens: np.ndarray
    edge_tokens: np.ndarray
    log_visual: np.ndarray
    log_text: np.ndarray
    log_first: np.ndarray
    log_edge: np.ndarray
    log_memory: np.ndarray
    layouts: tuple[VisualLayout, ...]
    where: np.ndarray | None = None

    @property
    def log_total(self) -> np.ndarray:
        """Log of the whole partition function [S, L, B, H]."""
        return np.logaddexp(self.log_visual, self.log_text)

    @property
    def mass(self) -> np.ndarray:
        """Visual attention mass Omega_V [S, L, B, H], in 0..1."""
        return np.exp(self.log_visual - self.log_total)

    @property
    def tvr(self) -> np.ndarray:
        """Text-to-visual ratio Z_T / Z_V [S, L, B, H]; infinite for a row without visual tokens."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_text - self.log_visual)

    @property
    def first_token_mass(self) -> np.ndarray:
        """Mass on the sequence's first token [S, L, B, H]: the attention sink of most decoders."""
        return np.exp(self.log_first - self.log_total)

    @property
    def edge_mass(self) -> np.ndarray:
        """Mass on visual tokens at image borders [S, L, B, H]; a part of `mass`."""
        return np.exp(self.log_edge - self.log_total)

    @property
    def memory_mass(self) -> np.ndarray:
        """Mass on the latents of VisMem's memories [S, L, B, H]; 0 while there are none."""
        return np.exp(self.log_memory - self.log_total)

    @property
    def mass_without_sinks(self) -> np.ndarray:
        """Share of the mass that is left without the first token [S, L, B, H] that goes to the image.

        NaN where the first token takes everything.
        """
        first = self.first_token_mass
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(first < 1, np.minimum(self.mass / (1 - first), 1.0), np.nan)
