"""Ask what pictures show behind a long text, where a VLM forgets them: with its memory and without.

    python -m studies eye export my-vlm --method pvm-warm-256-0-look-up-1200
    python examples/long_text.py my-vlm/pvm-warm-256-0-look-up-1200 my-vlm/pictures/said.txt my-vlm/pictures/*.png

The first command is of docs/eye.md; any memory will do. The first argument is its folder or hub id; its base model is
found by itself. The text stands between picture and question, as something that the model has written.
"""

import sys
from pathlib import Path

import keepsight
from keepsight.data.images import open_image

QUESTION = "What is here?"


def answer(model, processor, image, said: str) -> str:
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def main(adapter: str, text_file: str, image_files: list[str]) -> None:
    model, processor = keepsight.load(adapter)
    said = Path(text_file).read_text(encoding="utf-8").strip()
    print(f"{'':32}{'with the memory':24}without")
    for file in image_files:
        image = open_image(file)
        remembered = answer(model, processor, image, said)
        with model.disable_adapter():  # the base, bit for bit
            print(f"{Path(file).name:32}{remembered:24}{answer(model, processor, image, said)}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
