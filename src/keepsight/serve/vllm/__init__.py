"""PVM in stock vLLM: a plugin, no fork. Nothing is imported from vLLM here; `keepsight.serve.vllm.plugin` is the door.

names.py       which architecture of vLLM carries a memory under which name; knows neither torch nor vLLM
check.py       is this the vLLM we were written against?
attention.py   visual memory as ordinary paged attention: the two layouts of keys and values
memory.py      one block of `keepsight.pvm.module`, with its cache in vLLM's hands
model.py       what a VLM of vLLM needs to carry such blocks
families.py    the architectures
export.py      the folder that vLLM serves
rollouts.py    completions of GRPO, written by vLLM beside the trainer

And, an experiment, VisMem with vLLM as the writer:

latent_folder.py  the folder that vLLM loads
rows.py           a VLM of vLLM that knows the four special tokens
limits.py         what its sampler may choose
asking.py         an answer in vLLM's words: its prompt with memories in it, how tokens are chosen
vismem.py         answers written by vLLM, memories formed beside it
engine.py         the same for `keepsight serve`
"""
