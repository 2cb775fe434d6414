"""Does a VLM lose its image while it writes? Is its memory used? The instruments one by one, on the built-in VLM.

    python examples/diagnose.py [ADAPTER]

ADAPTER is a folder or hub id of a memory for the built-in VLM, such as `keepsight demo` makes. Needs the lab extra.
"""

import sys

import keepsight
from keepsight.diagnose import AttentionMeter, Battery, Reader, fit_trace, logit_lens, memory_of
from keepsight.lab.cases import DigitGrids


def main(source: str = "keepsight/reference") -> None:
    model, processor = keepsight.load(source)
    reader = Reader(model, processor)
    cases = DigitGrids(processor).cases(count=4, length=1024)
    inputs = reader.inputs(cases[0].sample)

    with AttentionMeter(model, every=4) as meter:
        text = reader.write(inputs, steps=256, temperature=1.0)
    print("attention:", fit_trace(meter.trace).sentence)

    lens = logit_lens(model, reader.with_text(inputs, text), len(text))
    print("logit lens, mean KL by layer:", " ".join(f"{kl:.3f}" for kl in lens.by_depth))

    battery = Battery(reader, cases=cases)
    for done in battery.run():
        print(f"tampering: {done} of {len(battery)} samples", file=sys.stderr)
    found = battery.result()
    print("memory:", "none" if memory_of(model) is None else found.verdict.sentence)
    for row in found.half_way:
        print(f"half-way, {row.name}: right for the first image {row.stays}, for the new one {row.follows}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
