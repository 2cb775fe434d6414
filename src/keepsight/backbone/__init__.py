"""Backbone: all that a memory must know of a VLM family, one small entry per family.

A family is *added* by one row in `families/` and one row in the tests' table. Everything else in keepsight asks the
backbone and never looks at a model's class. This package knows transformers and nothing of keepsight's methods.

The decoders of all families share one shape, on which the memories rest:

    vlm                                embeds the text, writes visual embeddings over the placeholder tokens
      vision tower, projector
      decoder                          takes `inputs_embeds` [B, T, D]
        layers[i]                      (`decoders.py` knows by which names)
          token mixer                  receives the decoder's extra keyword arguments
          norm before the FFN          its input is the residual stream after the mixer
          FFN, norm behind it          dense or mixture of experts
"""

from keepsight.backbone.model import Backbone
from keepsight.backbone.parts import Family, VisionParts
from keepsight.backbone.table import FAMILIES, family_of
from keepsight.backbone.unfit import PENDING, REMOTE, UNFIT

__all__ = ["FAMILIES", "PENDING", "REMOTE", "UNFIT", "Backbone", "Family", "VisionParts", "family_of"]
