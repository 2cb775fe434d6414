"""Ask a VLM about an image, with its memory and without.

    python examples/generate.py ADAPTER IMAGE "What is this?"

ADAPTER is a folder or hub id of a memory (see train_pvm.py); its base model is found by itself.
"""

import sys

import keepsight
from keepsight.data.images import open_image


def answer(model, processor, image, prompt: str) -> str:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def main(adapter: str, image_file: str, prompt: str) -> None:
    model, processor = keepsight.load(adapter)
    image = open_image(image_file)
    print("with the memory:   ", answer(model, processor, image, prompt))
    with model.disable_adapter():  # the base, bit for bit
        print("without the memory:", answer(model, processor, image, prompt))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
